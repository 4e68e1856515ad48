"""dit-accel: sparse attention, longer generation, caching and guidance for diffusers' diffusion transformers.

Names are loaded when they are requested, so that `import dit_accel` loads no torch, and --help stays quick; type
checkers read ``__init__.pyi``.
"""

from .public import HOMES, public_name

__getattr__ = public_name
__all__ = sorted({*HOMES, "__version__"})  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
