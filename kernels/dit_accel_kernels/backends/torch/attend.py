"""The torch backend: query tiles that see about equally much are gathered and batched; O(S) memory, every feature.

On a CPU with a compiler most dtypes run in a compiled loop instead (fused.py). For all else a chunk of query tiles is a
gather of key and value tiles, one batched product, a softmax, one batched product; masks, decay and votes are applied
while the logits are there. A selection is turned into lists of every batch and head first.
bench/block_sparse.py times other ways to write it, bench/selection.py what selections cost.
"""

import torch
from torch import Tensor

from ...bits import unpack_bits
from ...features import product_dtype, wide_dtype
from ...problem import Problem
from ...selection import LOG2_E
from ...states import resolved
from ...votes import Tally
from . import fused
from .chunks import Chunk, beyond, chunks_of
from .memory import buffer, cast, taken
from .tiled import Tiled, in_tiles

CHUNK_BYTES = 2 << 20  # logits of one chunk, a thread: more would leave the caches
GPU_CHUNKS = 256  # a GPU's chunks are this many times larger


def attend(problem: Problem, *, by_loop: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output [B, H, S_q, D], natural-log LSE float32 [B, H, S_q] (empty where not needed), exact tiles, kept bits.

    `by_loop` False leaves the compiled loop out.
    """
    tally, selects = Tally(problem) if problem.votes else None, problem.selection is not None
    problem, exact = resolved(problem)
    if by_loop and fused.takes(problem.q.device, problem.q.dtype):
        out, lse = fused.attend_by_loop(problem, tally)
    else:
        out, lse = _by_chunks(problem, in_tiles(problem), tally, remember=not selects)
        batch, heads, tokens, _ = problem.q.shape
        out = cast(out.view(batch, heads, -1, out.shape[-1])[:, :, :tokens], problem.q.dtype)
        lse = lse.view(batch, heads, -1)[:, :, :tokens] if problem.return_lse else lse
    return out, lse, exact, None if tally is None else tally.kept()


def _by_chunks(problem: Problem, tiled: Tiled, tally: Tally | None, *, remember: bool) -> tuple[Tensor, Tensor]:
    """Output and LSE of all query tiles, [B * H * NQ, block_q, Dv] and [B * H * NQ, block_q]."""
    out = tiled.q.new_zeros(*tiled.q.shape[:2], tiled.v.shape[2])  # query tiles that see nothing give 0
    shape = tiled.q.shape[:-1] if problem.return_lse else (0,)
    lse = tiled.q.new_full(shape, -torch.inf, dtype=wide_dtype(out.dtype))
    with torch.no_grad():
        for chunk in chunks_of(problem, *chunk_sizes(problem), remember=remember):
            _attend_chunk(tiled, out, lse if problem.return_lse else None, tally, chunk)
    return out, lse


def chunk_sizes(problem: Problem) -> tuple[int, int]:
    """Most columns of a chunk, and what its number of query tiles is a multiple of."""
    itemsize = product_dtype(problem.q.dtype, problem.q.device.type).itemsize
    columns = CHUNK_BYTES // (problem.block_q * itemsize)
    if problem.q.device.type != "cpu":
        return columns * GPU_CHUNKS, 1
    threads = torch.get_num_threads()
    return columns * threads, threads  # as many rows for each thread stay in its own cache


def _attend_chunk(tiled: Tiled, out: Tensor, lse: Tensor | None, tally: Tally | None, chunk: Chunk) -> None:
    """Write output and LSE of one chunk, and what votes need of it."""
    wide, means = wide_dtype(tiled.q.dtype), tiled.means if chunk.pooled.shape[1] else None
    q = taken("queries", tiled.q, chunk.q_tiles)
    result = buffer("outputs", q, (*q.shape[:2], tiled.v.shape[2]))
    columns = chunk.exact.shape[1] * tiled.k.shape[1]
    if tally is None and chunk.least == chunk.most:
        columns = chunk.most  # all end with the ragged tile
    x = buffer("products", q, (*q.shape[:2], columns + chunk.pooled.shape[1]))
    near, far = x[:, :, :columns], x[:, :, columns:]
    scale = tiled.scale if tally is None else tiled.scale * LOG2_E
    if columns:
        k = taken("tokens", tiled.k, chunk.exact).flatten(1, 2)[:, :columns]
        torch.baddbmm(near, q, k.mT, beta=0, alpha=scale, out=near)
    if means is not None:
        torch.baddbmm(far, q, means.k[chunk.pooled].mT, beta=0, alpha=scale, out=far)
    p = x
    if x.dtype != wide and (means is not None or tally is not None or tiled.decay is not None):
        x = buffer("wide", x, x.shape, wide).copy_(x)
    weights = softmax_weights(tiled, chunk)
    in_log2 = weights if tally is None or weights is None else weights * LOG2_E
    _, empty, hidden = transform(x, tiled, chunk, columns, in_log2)
    if tally is None:
        row_lse, total = _softmax(x, lse is not None), None
    else:
        row_lse, total = _exponentials(x, tiled, chunk, columns, tally)
    if empty is not None:  # before they are multiplied: oneDNN's bfloat16 on AMX lets NaN reach the row before
        x.masked_fill_(empty[:, :, None], 0.0)
        total = None if total is None else total.masked_fill(empty, torch.inf)
        row_lse = None if row_lse is None else row_lse.masked_fill(empty, -torch.inf)
    if p is not x:
        p.copy_(x if total is None else x.div_(total[:, :, None]))
    if columns:
        v = taken("tokens", tiled.v, chunk.exact).flatten(1, 2)[:, :columns]
        _weigh(p[:, :, :columns], v, hidden, result)
    else:
        result.zero_()
    if means is not None:
        result.baddbmm_(p[:, :, columns:], means.v[chunk.pooled])
    if total is not None and p is x:
        result.div_(total[:, :, None])
    out.index_copy_(0, chunk.q_tiles, result)
    if lse is not None and row_lse is not None:
        lse.index_copy_(0, chunk.q_tiles, row_lse.to(lse.dtype))


def transform(
    x: Tensor, tiled: Tiled, chunk: Chunk, columns: int, weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Decay logits, mask what is absent and add a pooled tile's length, in place.

    Returns the decay t; which rows see no key, bool [R, 1 or block_q] (None: all of them do); and where masks inside
    tiles may hide what is no number, what each row does not see, bool [R, block_q, columns].
    """
    t = decay_of(tiled, chunk, columns)
    if t is not None:
        torch.minimum(x, torch.mul(x, t, out=buffer("decayed", x, x.shape)), out=x)
    absent, start = absent_of(tiled, chunk, columns)
    x[:, :, start:columns].masked_fill_(absent, -torch.inf)
    if weights is not None:
        x[:, :, columns:].add_(weights[:, None])
    empty = None
    if tiled.absent is not None or chunk.partial is not None:
        empty = absent.all(-1)
        empty = empty if weights is None else empty & (weights == -torch.inf).all(1, keepdim=True)
    return t, empty, None if chunk.partial is None or tiled.finite else absent


def _weigh(p: Tensor, v: Tensor, hidden: Tensor | None, out: Tensor) -> None:
    """Write p @ v, where values that are no numbers reach the rows that see them alone: 0 times NaN is not 0."""
    if hidden is None:
        torch.bmm(p, v, out=out)
        return
    torch.bmm(p, v.nan_to_num(0.0, 0.0, 0.0), out=out)
    reached = (~hidden).to(v.dtype) @ (~v.isfinite()).to(v.dtype)
    out.masked_fill_(reached > 0, torch.nan)


def _softmax(x: Tensor, need_lse: bool) -> Tensor | None:
    """Logits to weights, in place; their LSE where needed."""
    peak = x.amax(-1) if need_lse else None
    torch.softmax(x, -1, out=x)
    # log sum e^x = max x - log max p: two cheap passes where a logsumexp would repeat the softmax
    wide = wide_dtype(x.dtype)
    return None if peak is None else peak.to(wide) - x.amax(-1).to(wide).log()


def _exponentials(x: Tensor, tiled: Tiled, chunk: Chunk, columns: int, tally: Tally) -> tuple[Tensor, Tensor]:
    """Logits in log2 units to exponentials, in place; LSE and their sums. Leaves with `tally` what votes go by."""
    by_tile = None
    near, far = x[:, :, :columns].unflatten(2, (-1, tiled.k.shape[1])), x[:, :, columns:]
    if columns and not tally.by_mass:
        by_tile = near.amax(-1)
        peak = by_tile.amax(-1, keepdim=True)
        if far.shape[2]:
            peak = torch.maximum(peak, far.amax(-1, keepdim=True))
    else:
        peak = x.amax(-1, keepdim=True)
    peak.clamp_(min=torch.finfo(peak.dtype).min)  # where a row sees nothing, or -inf alone
    x.sub_(peak).exp2_()
    if columns and tally.by_mass:
        by_tile = near.sum(-1)
        total = by_tile.sum(-1) + far.sum(-1)
    else:
        total = x.sum(-1)
    if by_tile is not None:
        tiles = chunk.exact % tiled.key_tiles
        tiles.masked_fill_(beyond(chunk.exact_counts, tiles.shape[1]), tally.none)
        tally.hold(chunk.q_tiles, tiles, by_tile.permute(2, 0, 1))
    return peak[:, :, 0] / LOG2_E + total.log(), total


def softmax_weights(tiled: Tiled, chunk: Chunk) -> Tensor | None:
    """What a chunk's pooled tiles add to their logits, log of their lengths, [R, p]; -inf in padding."""
    if not chunk.pooled.shape[1]:
        return None
    assert tiled.means is not None
    weights = tiled.means.log_length[chunk.pooled]
    return weights.masked_fill_(beyond(chunk.pooled_counts, weights.shape[1]), -torch.inf)


def absent_of(tiled: Tiled, chunk: Chunk, columns: int) -> tuple[Tensor, int]:
    """Which columns are padding, masked or hidden by a tile's mask, bool [R, 1 or block_q, columns - start]; start."""
    if tiled.absent is None and chunk.partial is None:
        return beyond(chunk.tokens, columns, chunk.least)[:, None], chunk.least
    absent = beyond(chunk.tokens, columns)[:, None]
    if tiled.absent is not None:
        absent = absent | tiled.absent[chunk.exact].flatten(1)[:, None, :columns]
    if chunk.partial is not None:
        assert tiled.bits is not None
        row, column, mask = chunk.partial
        block_k = tiled.k.shape[1]
        hidden = absent.new_zeros(len(chunk.exact), tiled.q.shape[1], chunk.exact.shape[1], block_k)
        hidden[row, :, column] = ~unpack_bits(tiled.bits[mask], block_k)
        absent = hidden.flatten(2)[:, :, :columns].logical_or_(absent)
    return absent, 0


def decay_of(tiled: Tiled, chunk: Chunk, columns: int) -> Tensor | None:
    """Decay of a chunk's logits, float32 [R, block_q, columns + pooled], or [R, 1, ...] where each tile has one frame.

    None in calls without decay.
    """
    if tiled.decay is None:
        return None
    count, frames = tiled.key_tiles, tiled.decay.frames
    frames = frames[chunk.q_tiles % len(frames)]
    if torch.equal(frames.amin(1), frames.amax(1)):
        frames = frames[:, :1]
    first = frames[:, :, None] * count
    by_token = taken("decay", tiled.decay.by_token, first + chunk.exact[:, None] % count).flatten(2)[:, :, :columns]
    if not chunk.pooled.shape[1]:
        return by_token
    return torch.cat([by_token, tiled.decay.by_tile[first + chunk.pooled[:, None] % count]], 2)
