"""Stand-ins for cuDNN's front end and FlashInfer: their calls' signatures and rules, and plain torch from lists alone.

Where the real ones leave something to their caller these are as unkind as they may be: beyond the last key lies
garbage, entries behind a row's count are out of range, and rows that need not be empty and are hold NaN.
"""

import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from dit_accel_kernels.backends import cudnn, flashinfer, library

GARBAGE = 50.0
architecture = "sm_90"
broken: str = ""  # what a test breaks: "lists" are ignored, or "base" of the LSE is the other's
calls: list[dict] = []  # what the last calls and plans were given


def _attended(q, k, v, seen, scale, base):
    """Output and LSE of single heads, [S, D]; NaN in rows that see nothing."""
    x = (q.double() @ k.double().T * scale).masked_fill(~seen, -torch.inf)
    lse = x.logsumexp(1)
    out = (x - lse[:, None]).exp() @ v.double()
    return out.to(q.dtype), (lse / math.log(base)).float()


def block_sparse_attention_forward(
    q_tensor: torch.Tensor, k_tensor: torch.Tensor, v_tensor: torch.Tensor, q2k_block_index: torch.Tensor,
    block_sparse_num: int | None = None, block_sizes: torch.Tensor | None = None,
    q2k_block_nums: torch.Tensor | None = None, *, sparse_block_size: int | None = None,
    allow_empty_block_nums: bool = False, softmax_scale: float | None = None, pack_gqa: bool | None = None,
    layout: str = "bhsd", kv_splits: int | str = 1, use_clc: bool | None = None,
):  # fmt: skip
    assert (layout, pack_gqa, kv_splits) == ("bshd", False, 1)  # else heads share lists, and splits need full rows
    for x in (q_tensor, k_tensor, v_tensor):
        assert x.is_contiguous()
        assert x.data_ptr() % 64 == 0  # 128 on a card, where memory begins at multiples of it
    q, k, v = (x.transpose(1, 2) for x in (q_tensor, k_tensor, v_tensor))
    batch, heads, num_q, dim = q.shape
    num_k, side = k.shape[2], sparse_block_size
    tiles, key_tiles = -(-num_q // side), -(-num_k // side)
    calls.append(dict(index=q2k_block_index, counts=q2k_block_nums))
    assert dim in ((128,) if architecture == "sm_120" else (64, 96, 128))
    if side == 64 and architecture == "sm_90":
        assert num_q % 64 == 0
    if side == 64 and architecture == "sm_100":
        assert (q.dtype, dim, k.shape[1]) == (torch.bfloat16, 128, heads)
    assert q2k_block_index.dtype == q2k_block_nums.dtype == torch.int32
    assert q2k_block_index.shape[:3] == q2k_block_nums.shape == (batch, heads, tiles)
    assert 1 <= q2k_block_index.shape[3] <= key_tiles
    if block_sizes is not None:
        assert (block_sizes.dtype, block_sizes.shape) == (torch.int32, (key_tiles,))
    pad = (0, 0, 0, key_tiles * side - num_k)
    k, v = (torch.nn.functional.pad(x, pad, value=GARBAGE).repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    within = torch.arange(side) < (side if block_sizes is None else block_sizes[:, None])
    out, lse = torch.empty(batch, num_q, heads, dim, dtype=q.dtype), torch.empty(batch, heads, num_q)
    for b, h in torch.cartesian_prod(torch.arange(batch), torch.arange(heads)).tolist():
        seen = torch.full((tiles, key_tiles), broken == "lists")
        for row, count in enumerate(q2k_block_nums[b, h].tolist()):
            listed = q2k_block_index[b, h, row, :count].long()
            assert len(listed.unique()) == count
            seen[row, listed] = True
        every = (seen[:, :, None] & within).flatten(1).repeat_interleave(side, 0)[:num_q]
        base = 2 if broken == "base" else math.e
        out[b, :, h], lse[b, h] = _attended(q[b, h], k[b, h], v[b, h], every, softmax_scale, base)
        if allow_empty_block_nums:
            out[b, ~every.any(1), h] = 0
    return {"o_tensor": out, "lse_tensor": lse}


class VariableBlockSparseAttentionWrapper:
    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        assert (float_workspace_buffer.numel(), float_workspace_buffer.dtype) == (128 << 20, torch.uint8)

    def plan(
        self, block_mask_map: torch.Tensor, block_row_sz: torch.Tensor, block_col_sz: torch.Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, causal: bool = False, pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False, logits_soft_cap: float | None = None, sm_scale: float | None = None,
        rope_scale: float | None = None, rope_theta: float | None = None, non_blocking: bool = True,
        q_data_type: str | torch.dtype = "float16", kv_data_type: str | torch.dtype | None = None,
        q_scale: torch.Tensor | None = None, k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        if broken == "plan":
            raise RuntimeError("Failed to allocate memory\nfor batch_prefill_tmp_v")
        assert block_mask_map.dtype == torch.bool
        assert block_row_sz.dtype == block_col_sz.dtype == torch.int32
        assert block_mask_map.shape == (num_kv_heads, block_row_sz.shape[1], block_col_sz.shape[1])
        assert len(block_row_sz) == len(block_col_sz) == num_kv_heads
        assert not non_blocking
        calls.append(dict(mask=block_mask_map))
        self.heads, self.key_heads, self.scale, self.dtype = num_qo_heads, num_kv_heads, sm_scale, q_data_type
        rows, columns = ([row.long() for row in x] for x in (block_row_sz, block_col_sz))
        self.seen = [
            (x | (broken == "lists")).repeat_interleave(r, 0).repeat_interleave(c, 1)
            for x, r, c in zip(block_mask_map, rows, columns, strict=True)
        ]

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None, return_lse: bool = False, enable_pdl: bool | None = None,
    ):  # fmt: skip
        assert (q.shape[0], k.shape[0], v.shape[0]) == (self.heads, self.key_heads, self.key_heads)
        assert q.dtype == k.dtype == v.dtype == self.dtype
        repeat, base = self.heads // self.key_heads, math.e if broken == "base" else 2
        both = [
            _attended(q[h], k[h // repeat], v[h // repeat], self.seen[h // repeat], self.scale, base)
            for h in range(self.heads)
        ]
        out, lse = (torch.stack(x) for x in zip(*both, strict=True))
        return (out, lse) if return_lse else out


def install(monkeypatch, arch: str = "sm_90") -> None:
    """Let `cudnn` and `flashinfer` be the stand-ins until the test ends, on a card of this architecture."""
    monkeypatch.setattr(sys.modules[__name__], "architecture", arch)
    for ours, name in ((cudnn, cudnn.FUNCTION), (flashinfer, flashinfer.WRAPPER)):
        leaf = ours.__name__.rpartition(".")[2]
        module = ModuleType(leaf)
        module.__spec__ = ModuleSpec(leaf, None)
        setattr(module, name, globals()[name])
        monkeypatch.setitem(sys.modules, leaf, module)
        monkeypatch.setattr(ours, "architecture", lambda device: arch)
    library.missing_package.cache_clear()
    calls.clear()
