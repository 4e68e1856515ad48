"""dit-accel: sparse attention, longer generation, caching and guidance for diffusers' diffusion transformers.

Names are loaded when they are asked for, so that `import dit_accel` loads no torch, and --help stays quick; type
checkers read ``__init__.pyi``.
"""

from .public import HOMES
from .public import public_name as __getattr__

__all__ = [*HOMES, "__version__"]


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES, "__version__"})
