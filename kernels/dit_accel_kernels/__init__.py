"""Block-sparse attention over tile lists with exact, pooled and skipped tiles: one call, several backends."""

from .api import (
    backend_of_last_call,
    block_sparse_attention,
    block_sparse_attention_backward,
    block_sparse_attention_eager,
    selected_tiles,
    speed_over_dense,
)  # fmt: skip
from .backends.cudnn import missing_requirement as cudnn_requirement
from .backends.fa4 import missing_requirement as fa4_requirement
from .backends.flashinfer import missing_requirement as flashinfer_requirement
from .backends.flex import missing_requirement as flex_requirement
from .backends.torch.fused import way as torch_way
from .backends.triton.support import missing_requirement as triton_requirement
from .bits import count_bits, pack_bits, unpack_bits
from .cache import release_captured
from .checks import BACKENDS
from .choice.race import decisions, speed_of_dense_by
from .csr import EXACT, PARTIAL, POOLED, SKIPPED
from .errors import BackendUnavailableError
from .features import FrameDecay
from .selection import Routing, Selection, Vote
from .tiles import TileLists

__all__ = [
    "BACKENDS", "EXACT", "PARTIAL", "POOLED", "SKIPPED", "BackendUnavailableError", "FrameDecay", "Routing",
    "Selection", "TileLists", "Vote", "backend_of_last_call", "block_sparse_attention",
    "block_sparse_attention_backward", "block_sparse_attention_eager", "count_bits", "cudnn_requirement", "decisions",
    "fa4_requirement", "flashinfer_requirement", "flex_requirement", "pack_bits", "release_captured", "selected_tiles",
    "speed_of_dense_by", "speed_over_dense", "torch_way", "triton_requirement", "unpack_bits",
]  # fmt: skip
