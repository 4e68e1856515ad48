"""Block-sparse attention over tile lists with exact, pooled and skipped tiles: one call, several backends."""

from dit_accel_kernels.api import (
    block_sparse_attention,
    block_sparse_attention_backward,
    block_sparse_attention_eager,
    resolve_backend,
)  # fmt: skip
from dit_accel_kernels.backends.cpu import predicted_speedup
from dit_accel_kernels.backends.fa4.support import missing_requirement as fa4_requirement
from dit_accel_kernels.backends.flex import missing_requirement as flex_requirement
from dit_accel_kernels.backends.torch.fused import way as torch_way
from dit_accel_kernels.backends.triton.support import missing_requirement as triton_requirement
from dit_accel_kernels.cache import release_captured
from dit_accel_kernels.checks import BACKENDS
from dit_accel_kernels.errors import BackendUnavailableError
from dit_accel_kernels.features import FrameDecay
from dit_accel_kernels.selection import Routing, Selection, Vote, count_bits, pack_bits, unpack_bits
from dit_accel_kernels.tiles import EXACT, POOLED, SKIPPED, TileLists

__all__ = [
    "BACKENDS", "EXACT", "POOLED", "SKIPPED", "BackendUnavailableError", "FrameDecay", "Routing", "Selection",
    "TileLists", "Vote", "block_sparse_attention", "block_sparse_attention_backward", "block_sparse_attention_eager",
    "count_bits", "fa4_requirement", "flex_requirement", "pack_bits", "predicted_speedup", "release_captured",
    "resolve_backend", "torch_way", "triton_requirement", "unpack_bits",
]  # fmt: skip
