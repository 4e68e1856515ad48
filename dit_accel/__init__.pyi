"""The public names of `dit_accel`, as type checkers see them; `dit_accel.public` loads the same."""

from .attachment.attachment import Attachment as Attachment
from .attachment.attachment import attach as attach
from .attachment.attachment import attachment_of as attachment_of
from .errors import AttachError as AttachError
from .errors import ConfigError as ConfigError
from .errors import DitAccelError as DitAccelError
from .errors import MissingBackend as MissingBackend
from .errors import ProcessLost as ProcessLost
from .errors import UnsupportedModel as UnsupportedModel
from .estimate.describe import Description as Description
from .estimate.describe import describe as describe
from .estimate.recommend import recommend as recommend
from .estimate.recommendation import Recommendation as Recommendation
from .estimate.recommendation import Setting as Setting
from .methods.attention.delta import DeltaAttention as DeltaAttention
from .methods.attention.dfa import DFA as DFA
from .methods.attention.lite.lite_config import LiteAttention as LiteAttention
from .methods.attention.lvsa import LVSA as LVSA
from .methods.attention.radial import RadialAttention as RadialAttention
from .methods.attention.sol import SolAttention as SolAttention
from .methods.attention.sparsed import SparseD as SparseD
from .methods.attention.ultravico import UltraViCo as UltraViCo
from .methods.caches.db import DBCache as DBCache
from .methods.caches.db import FirstBlockCache as FirstBlockCache
from .methods.caches.easy import EasyCache as EasyCache
from .methods.caches.mag import MagCache as MagCache
from .methods.caches.profiling import ProfilingCache as ProfilingCache
from .methods.caches.prune import DBPrune as DBPrune
from .methods.caches.reference import ReferenceCache as ReferenceCache
from .methods.caches.sea import SeaCache as SeaCache
from .methods.caches.static import StaticCache as StaticCache
from .methods.caches.tea import TeaCache as TeaCache
from .methods.guidance.autoguidance import AutoGuidance as AutoGuidance
from .methods.guidance.cfg_cache import CFGCache as CFGCache
from .methods.guidance.nag import NAG as NAG
from .methods.guidance.seg import SEG as SEG
from .methods.guidance.slg import SLG as SLG
from .methods.guidance.softpag import PAG as PAG
from .methods.guidance.softpag import SoftPAG as SoftPAG
from .methods.positions.rope import RoPE as RoPE
from .methods.positions.ultraimage import UltraImage as UltraImage
from .plan.layout import TokenLayout as TokenLayout
from .report.report import Report as Report

__version__: str
