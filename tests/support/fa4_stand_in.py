"""A stand-in for flash-attn-4: its call's signature, its lists' rules, and plain torch from counts and indices alone.

What it is given decides what it computes: a wrong list, count or bit gives a wrong output. Where the real one leaves
something to its caller it is as unkind as it may be: beyond the last key lies garbage, which it masks only in the block
it visits first, the last listed one, and rows without a block hold NaN.
"""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

GARBAGE = 50.0
architecture = "sm_90"
calls: list[dict] = []  # what the last calls were given, for tests


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: torch.Tensor | None = None
    dq_write_order_full: torch.Tensor | None = None
    spt: bool | None = None


def flash_attn_func(  # its arguments in their order
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qv: Any = None, gather_kv_indices: Any = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple = (None, None),
    learnable_sink: Any = None, softcap: float = 0.0, num_splits: int = 1, pack_gqa: bool | None = None,
    deterministic: bool = False, score_mod: Callable | None = None, score_mod_bwd: Callable | None = None,
    mask_mod: Callable | None = None, aux_tensors: list | None = None, aux_scalars: tuple | None = None,
    block_sparse_tensors: BlockSparseTensorsTorch | None = None,
    block_sparse_tensors_bwd: BlockSparseTensorsTorch | None = None, return_lse: bool = False,
    gather_bwd_recompute_p: bool = False, gather_bwd_token_chunk: int | None = None,
):  # fmt: skip
    assert block_sparse_tensors is not None
    assert softmax_scale is not None
    calls.append(dict(tensors=block_sparse_tensors, mask_mod=mask_mod, score_mod=score_mod, aux_tensors=aux_tensors))
    partial_counts, partial, full_counts, full, _, _, (block_q, block_k), *_ = block_sparse_tensors
    batch, num_q, heads, _ = q.shape
    num_k, repeat = k.shape[1], heads // k.shape[2]
    blocks, key_blocks = -(-num_q // block_q), -(-num_k // block_k)
    own = 256 if architecture == "sm_100" and num_q > 128 else 128  # queries of a block there: two tiles of 128
    assert block_q % own == 0, f"the sparse block of {block_q} queries must be a multiple of {own}"
    for counts, indices in ((partial_counts, partial), (full_counts, full)):
        assert counts.dtype == indices.dtype == torch.int32
        assert counts.shape == indices.shape[:3]
        assert counts.shape[0] in (1, batch)
        assert counts.shape[1] in (1, heads)
        assert counts.shape[2] == blocks
        assert indices.shape[3] <= key_blocks
    assert not pack_gqa or counts.shape[1] == 1
    pad = (0, 0, 0, 0, 0, key_blocks * block_k - num_k)
    k, v = (torch.nn.functional.pad(x, pad, value=GARBAGE).repeat_interleave(repeat, 2) for x in (k, v))
    out, lse = torch.full(q.shape, torch.nan), torch.full((batch, heads, num_q), torch.nan)
    for b, h, m in torch.cartesian_prod(*map(torch.arange, (batch, heads, blocks))).tolist():
        place, rows = (b % counts.shape[0], h % counts.shape[1], m), torch.arange(m * block_q, num_q)[:block_q]
        columns, seen = [], []
        for masked, (cnt, idx) in enumerate(((full_counts, full), (partial_counts, partial))):
            listed = idx[place][: cnt[place]]
            for block in listed.tolist():
                keys = block * block_k + torch.arange(block_k)
                keep = keys < num_k if block == listed[-1] else torch.ones_like(keys, dtype=torch.bool)
                keep = keep.expand(len(rows), -1)
                if masked:
                    assert mask_mod is not None
                    keep = keep & mask_mod((b,), (h,), (rows[:, None],), (keys[None] % num_k,), None, aux_tensors)
                columns.append(keys)
                seen.append(keep)
        if not columns:
            continue
        keys = torch.cat(columns)
        x = softmax_scale * (q[b, rows, h].float() @ k[b, keys, h].float().T)
        if score_mod is not None:
            places = dict(q_idx=(rows[:, None],), kv_idx=(keys[None] % num_k,))
            x = score_mod((x,), (b,), (h,), **places, seqlen_info=None, aux_tensors=aux_tensors)
        x = x.masked_fill(~torch.cat(seen, 1), -torch.inf)
        top = x.amax(1, keepdim=True).clamp(min=-1e30)
        p = (x - top).exp()
        total = p.sum(1, keepdim=True)
        out[b, rows, h] = (p.to(q.dtype) @ v[b, keys, h]).float() / total.clamp(min=1e-30)
        lse[b, h, rows] = (top + total.log())[:, 0]
    return out.to(q.dtype), lse if return_lse else None


def install(monkeypatch, arch: str) -> None:
    """Let `flash_attn.cute` and `cutlass` be the stand-in until the test ends, on a card of this architecture."""
    from dit_accel_kernels.backends import fa4

    global architecture
    architecture = arch
    names = ("flash_attn", "flash_attn.cute", "cutlass", "cutlass.cute")
    modules = {name: ModuleType(name) for name in names}
    for leaf, content in (
        ("interface", dict(flash_attn_func=flash_attn_func)),
        ("block_sparsity", dict(BlockSparseTensorsTorch=BlockSparseTensorsTorch)),
        ("utils", dict(scalar_to_ssa=lambda x, dtype: x)),
    ):
        modules[f"flash_attn.cute.{leaf}"] = ModuleType(leaf)
        vars(modules[f"flash_attn.cute.{leaf}"]).update(content)
    vars(modules["cutlass.cute"]).update(jit=lambda function: function, arch=SimpleNamespace(fmin=torch.minimum))
    vars(modules["cutlass"]).update(Boolean=bool, Float32=float)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, leaf = name.rpartition(".")
        if parent:
            vars(modules[parent])[leaf] = module
    monkeypatch.setitem(sys.modules, "dit_accel_kernels.backends.fa4_modifiers", None)
    monkeypatch.delitem(sys.modules, "dit_accel_kernels.backends.fa4_modifiers")  # imported anew, on the stand-in
    monkeypatch.setattr(fa4, "architecture", lambda device: arch)
    monkeypatch.setattr(fa4, "missing_package", lambda *given: None)
    calls.clear()
