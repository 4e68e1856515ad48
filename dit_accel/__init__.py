"""dit-accel: sparse attention, longer generation, caching and guidance for diffusers' diffusion transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .public import HOMES

if TYPE_CHECKING:
    from .attachment.attachment import Attachment as Attachment
    from .attachment.attachment import attach as attach
    from .errors import AttachError as AttachError
    from .errors import ConfigError as ConfigError
    from .errors import DitAccelError as DitAccelError
    from .errors import MissingBackend as MissingBackend
    from .errors import UnsupportedModel as UnsupportedModel
    from .estimate.describe import Description as Description
    from .estimate.describe import describe as describe
    from .methods.attention.delta import DeltaAttention as DeltaAttention
    from .methods.attention.lite.handler import LiteAttention as LiteAttention
    from .methods.attention.radial import RadialAttention as RadialAttention
    from .methods.attention.sol import SolAttention as SolAttention
    from .methods.attention.sparsed import SparseD as SparseD
    from .methods.attention.ultravico import UltraViCo as UltraViCo
    from .report.report import Report as Report

__all__ = list(HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:  # so that `import dit_accel` loads no torch, and --help stays quick
    if name not in HOMES:
        raise AttributeError(f"module 'dit_accel' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
