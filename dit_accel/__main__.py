"""The command line as a module, `python -m dit_accel`, for launchers that start modules."""

from .cli import main

if __name__ == "__main__":
    main()
