"""Block-sparse attention over tile lists with exact, pooled and skipped tiles: one call, several backends."""

from .api import (
    block_sparse_attention,
    block_sparse_attention_backward,
    block_sparse_attention_eager,
    resolve_backend,
    selected_tiles,
)  # fmt: skip
from .backends.cpu import dense_speed, predicted_speedup
from .backends.fa4.support import missing_requirement as fa4_requirement
from .backends.flex import missing_requirement as flex_requirement
from .backends.torch.fused import way as torch_way
from .backends.triton.support import missing_requirement as triton_requirement
from .bits import count_bits, pack_bits, unpack_bits
from .cache import release_captured
from .checks import BACKENDS
from .csr import EXACT, PARTIAL, POOLED, SKIPPED
from .errors import BackendUnavailableError
from .features import FrameDecay
from .selection import Routing, Selection, Vote
from .tiles import TileLists

__all__ = [
    "BACKENDS", "EXACT", "PARTIAL", "POOLED", "SKIPPED", "BackendUnavailableError", "FrameDecay", "Routing",
    "Selection", "TileLists", "Vote", "block_sparse_attention", "block_sparse_attention_backward",
    "block_sparse_attention_eager", "count_bits", "dense_speed", "fa4_requirement", "flex_requirement", "pack_bits",
    "predicted_speedup", "release_captured", "resolve_backend", "selected_tiles", "torch_way", "triton_requirement",
    "unpack_bits",
]  # fmt: skip
