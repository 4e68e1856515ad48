"""Stand-ins for cuDNN's front end and FlashInfer: their calls' signatures and rules, and plain torch from lists alone.

Where the real ones leave something to their caller these are as unkind as they may be: beyond the last key lies
garbage, and rows without a key hold NaN where they were not allowed for.
"""

import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from dit_accel_kernels.backends import cudnn, flashinfer, library

GARBAGE = 50.0
broken: str = ""  # what a test breaks: "lists" are ignored, "base" of the LSE is the other's, "plan" has no memory
calls: list[torch.Tensor] = []  # the lists of the last calls and plans


def _attended(q, k, v, seen, scale, base):
    """Output and LSE of [.., H, S, D], k and v of fewer heads; NaN in rows that see nothing."""
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3).double() for x in (k, v))
    x = (q.double() @ k.mT * scale).masked_fill(~seen, -torch.inf)
    return (x.softmax(-1) @ v).to(q.dtype), (x.logsumexp(-1) / math.log(base)).float()


def block_sparse_attention_forward(
    q_tensor, k_tensor, v_tensor, q2k_block_index, block_sparse_num=None, block_sizes=None, q2k_block_nums=None, *,
    sparse_block_size=None, allow_empty_block_nums=False, softmax_scale=None, pack_gqa=None, layout="bhsd", kv_splits=1,
    use_clc=None,
):  # fmt: skip
    side, index, counts = sparse_block_size, q2k_block_index, q2k_block_nums
    assert (layout, pack_gqa, kv_splits) == ("bshd", False, 1)  # else heads share lists, and splits need full rows
    # 128 on a card, where memory begins at multiples of it
    assert all(x.is_contiguous() and x.data_ptr() % 64 == 0 for x in (q_tensor, k_tensor, v_tensor))
    q, k, v = (x.transpose(1, 2) for x in (q_tensor, k_tensor, v_tensor))
    (*rows, num_q, _), num_k = q.shape, k.shape[2]
    tiles, key_tiles = -(-num_q // side), -(-num_k // side)
    assert side == 128 or num_q % 64 == 0
    assert index.dtype == counts.dtype == torch.int32
    assert index.shape[:3] == counts.shape == (*rows, tiles)
    listed = torch.arange(index.shape[3]) < counts[..., None]
    seen = torch.zeros(*rows, tiles, key_tiles + 1, dtype=torch.bool)
    seen = seen.scatter(3, index.long().where(listed, key_tiles), True)[..., :-1]
    assert torch.equal(seen.sum(3), counts)  # each tile once
    calls.append(index)
    sizes = torch.full((key_tiles,), side, dtype=torch.int32) if block_sizes is None else block_sizes
    assert (sizes.dtype, sizes.shape) == (torch.int32, (key_tiles,))
    within = torch.arange(side) < sizes[:, None]
    seen = ((seen | (broken == "lists"))[..., None] & within).flatten(3).repeat_interleave(side, 2)[:, :, :num_q]
    pad = (0, 0, 0, key_tiles * side - num_k)
    k, v = (torch.nn.functional.pad(x, pad, value=GARBAGE) for x in (k, v))
    out, lse = _attended(q, k, v, seen, softmax_scale, 2 if broken == "base" else math.e)
    out = out.masked_fill(~seen.any(3, keepdim=True), 0) if allow_empty_block_nums else out
    return {"o_tensor": out.transpose(1, 2), "lse_tensor": lse}


class VariableBlockSparseAttentionWrapper:
    def __init__(self, float_workspace_buffer, backend="auto"):
        assert (float_workspace_buffer.numel(), float_workspace_buffer.dtype) == (128 << 20, torch.uint8)

    def plan(
        self, block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim, causal=False,
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, logits_soft_cap=None, sm_scale=None, rope_scale=None,
        rope_theta=None, non_blocking=True, q_data_type="float16", kv_data_type=None, q_scale=None, k_scale=None,
        v_scale=None,
    ):  # fmt: skip
        if broken == "plan":
            raise RuntimeError("Failed to allocate memory\nfor batch_prefill_tmp_v")
        mask, rows, columns = block_mask_map, block_row_sz, block_col_sz
        assert (mask.dtype, rows.dtype, columns.dtype) == (torch.bool, torch.int32, torch.int32)
        assert mask.shape == (num_kv_heads, rows.shape[1], columns.shape[1])
        calls.append(mask)
        self.dtype, self.scale = q_data_type, sm_scale
        each = zip(mask | (broken == "lists"), rows.long(), columns.long(), strict=True)
        seen = torch.stack([x.repeat_interleave(r, 0).repeat_interleave(c, 1) for x, r, c in each])
        self.seen = seen.repeat_interleave(num_qo_heads // num_kv_heads, 0)

    def run(self, q, k, v, out=None, lse=None, return_lse=False, enable_pdl=None):
        assert q.dtype == k.dtype == v.dtype == self.dtype
        out, lse = _attended(q, k, v, self.seen, self.scale, math.e if broken == "base" else 2)
        return (out, lse) if return_lse else out


def install(monkeypatch, arch: str = "sm_90") -> None:
    """Let `cudnn` and `flashinfer` be the stand-ins until the test ends, on a card of this architecture."""
    for ours, name in ((cudnn, cudnn.FUNCTION), (flashinfer, flashinfer.WRAPPER)):
        leaf = ours.__name__.rpartition(".")[2]
        module = ModuleType(leaf)
        module.__spec__ = ModuleSpec(leaf, None)
        setattr(module, name, globals()[name])
        monkeypatch.setitem(sys.modules, leaf, module)
        monkeypatch.setattr(ours, "architecture", lambda device: arch)
    library.missing_package.cache_clear()
    calls.clear()
