"""dit-accel: sparse attention, longer generation, caching and guidance for diffusers' diffusion transformers."""

from typing import TYPE_CHECKING

from .public import HOMES, public_name

if TYPE_CHECKING:
    from .attachment.attachment import Attachment as Attachment
    from .attachment.attachment import attach as attach
    from .attachment.attachment import attachment_of as attachment_of
    from .errors import AttachError as AttachError
    from .errors import ConfigError as ConfigError
    from .errors import DitAccelError as DitAccelError
    from .errors import MissingBackend as MissingBackend
    from .errors import UnsupportedModel as UnsupportedModel
    from .estimate.describe import Description as Description
    from .estimate.describe import describe as describe
    from .methods.attention.delta import DeltaAttention as DeltaAttention
    from .methods.attention.lite.config import LiteAttention as LiteAttention
    from .methods.attention.radial import RadialAttention as RadialAttention
    from .methods.attention.sol import SolAttention as SolAttention
    from .methods.attention.sparsed import SparseD as SparseD
    from .methods.attention.ultravico import UltraViCo as UltraViCo
    from .methods.caches.db import DBCache as DBCache
    from .methods.caches.db import FirstBlockCache as FirstBlockCache
    from .methods.caches.easy import EasyCache as EasyCache
    from .methods.caches.mag import MagCache as MagCache
    from .methods.caches.static import StaticCache as StaticCache
    from .methods.caches.tea import TeaCache as TeaCache
    from .plan.layout import TokenLayout as TokenLayout
    from .report.report import Report as Report
else:  # `import dit_accel` loads no torch, and --help stays quick; type checkers still see a misspelt name
    __getattr__ = public_name

__all__ = [*HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]
__version__: str


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES, "__version__"})
