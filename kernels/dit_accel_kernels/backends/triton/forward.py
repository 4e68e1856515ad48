"""The forward kernel: one program attends one query tile (or a part of it) over its exact and pooled key tiles.

Tiles come sorted into three sections of a row's list (plan.py): *plain* ones, whose loop neither masks nor branches;
*constant* ones, which share one decay t; and *slow* ones, where keys are missing, t differs by element or a mask hides
pairs. Pooled tiles come last: a chunk of means, which lie in sequence, is one product on the full query rows, with log2
of the true length added to the logit, -inf for those that the row's bits leave out. All share one running maximum and
one row sum. Logits are in base 2; sums are float32; addresses are 64-bit. Head dims that are no power of 2 are cut into
two column parts (96 = 64 + 32), the second padded where it must be.
"""

import triton
import triton.language as tl

from .eight import _beside, _scaled_queries, _with_centre, _with_keys, _with_means
from .loads import _from, _keys, _load, _load_near, _tokens, _unmasked
from .votes import _begin, _sections, _store_rest, _vote


@triton.jit
def _products(q1, q2, k1, k2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """Raw logits of query rows and keys, whose integers are summed as such."""
    x = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    if D2 > 0:
        x = tl.dot(q2, tl.trans(k2), x, input_precision=PRECISION)
    return x.to(tl.float32)


@triton.jit
def _add(p, alpha, total, acc1, acc2, v1, v2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """Row sum, accumulators and the chunk's own sum after one more chunk with weights p; the rest shrinks by alpha."""
    total *= alpha
    mass = tl.sum(p, 1)
    total += mass
    p = p.to(v1.dtype)
    acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision=PRECISION)
    if D2 > 0:
        acc2 = tl.dot(p, v2, acc2 * alpha[:, None], input_precision=PRECISION)
    return total, acc1, acc2, mass


@triton.jit
def _decay_rows(x, t, chosen):
    """Logits with the decay t of each key in the chosen rows: one row of t a frame, since a tile has few frames."""
    return tl.where(chosen[:, None], tl.minimum(x, x * t[None, :]), x)


@triton.jit
def _frames(q_frames_ptr, token, live):
    """The frame of each row, the first and the last one; rows outside the video have frame -1 and never decay."""
    if q_frames_ptr is not None:
        q_frame = tl.load(q_frames_ptr + token, mask=live, other=-1)
        last = tl.max(q_frame, 0)
        return q_frame, tl.min(tl.where(q_frame < 0, last, q_frame), 0), last
    else:
        return 0, 0, 0


@triton.jit
def _add_masked(x, m, total, acc1, acc2, v1, v2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """One more chunk of base-2 logits x, where some rows may hold nothing but -inf, so far and in x.

    Also returns what a vote asks for: the chunk's largest logit, what earlier weights shrank by, and its sum.
    """
    top = tl.max(x, 1)
    m_new = tl.maximum(m, top)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p, alpha = tl.exp2(x - base[:, None]), tl.exp2(m - base)
    total, acc1, acc2, mass = _add(p, alpha, total, acc1, acc2, v1, v2, D2, PRECISION)
    return m_new, total, acc1, acc2, top, alpha, mass


@triton.jit
def _store_part(ptr, rows, live, stride, value, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    columns = START + tl.arange(0, WIDTH)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=live[:, None] & (columns < DIM)[None, :])


@triton.jit
def _full_chunk(
    first, a_ptr, b_ptr, token_order_ptr, stride_as, stride_bs,
    BLOCK: tl.constexpr, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DIM_B: tl.constexpr, D1B: tl.constexpr, D2B: tl.constexpr,
):  # fmt: skip
    """Two tensors' tokens from `first` on, in two column parts each, and the rows that hold them; all are there."""
    row = first + tl.arange(0, BLOCK)
    if token_order_ptr is None:
        a_ptr += first * stride_as
        b_ptr += first * stride_bs
        a1, b1 = _load_near(a_ptr, stride_as, BLOCK, 0, D1, DIM), _load_near(b_ptr, stride_bs, BLOCK, 0, D1B, DIM_B)
        a2 = _load_near(a_ptr, stride_as, BLOCK, D1, D2, DIM) if D2 > 0 else 0.0
        b2 = _load_near(b_ptr, stride_bs, BLOCK, D1B, D2B, DIM_B) if D2B > 0 else 0.0
    else:
        row = tl.load(token_order_ptr + row)
        a1, a2 = _load(a_ptr, row, row, stride_as, False, DIM, D1, D2)
        b1, b2 = _load(b_ptr, row, row, stride_bs, False, DIM_B, D1B, D2B)
    return row, a1, a2, b1, b2


@triton.jit
def _keys_and_values(
    k_tile, position, k_ptr, v_ptr, k_desc, v_desc, b, hk, token_order_ptr, stride_ks, stride_vs,
    BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DIM_V: tl.constexpr, D1V: tl.constexpr, D2V: tl.constexpr,
):  # fmt: skip
    """K and V of one chunk of a tile, in two column parts each; every key is there.

    The caller loads the tile's number a turn early: a list entry and what it points to in one turn of the loop would
    halve the depth of Triton's pipeline. With descriptors one thread asks for a chunk, and no thread holds addresses.
    """
    SUBS_K: tl.constexpr = TILE_K // BLOCK_K
    if k_desc is not None:
        key = k_tile * TILE_K + position % SUBS_K * BLOCK_K
        k1 = k_desc.load([b, hk, key, 0]).reshape(BLOCK_K, D1)
        return k1, 0.0, v_desc.load([b, hk, key, 0]).reshape(BLOCK_K, D1V), 0.0
    first = k_tile.to(tl.int64) * TILE_K + position % SUBS_K * BLOCK_K
    _, k1, k2, v1, v2 = _full_chunk(
        first, k_ptr, v_ptr, token_order_ptr, stride_ks, stride_vs, BLOCK_K, DIM, D1, D2, DIM_V, D1V, D2V
    )  # fmt: skip
    return k1, k2, v1, v2


@triton.jit
def _pooled_range(bounds_ptr, BLOCK: tl.constexpr):
    """The first pooled key tile of a row, down to a whole chunk, and one past the last."""
    return tl.load(bounds_ptr + 4).to(tl.int32) // BLOCK * BLOCK, tl.load(bounds_ptr + 5).to(tl.int32)


@triton.jit
def _pooled_bits(bits_ptr, k_tile, k_tiles):
    """Whether a row's bits hold key tiles; those that are not there they don't."""
    word = tl.load(bits_ptr + k_tile // 32, mask=k_tile < k_tiles, other=0)
    return (word >> k_tile % 32) & 1 != 0


@triton.jit
def _pooled_bias(log_length_ptr, bits_ptr, k_tile, k_tiles):
    """What is added to the logits of key tiles: log2 of the length, -inf for those that a row's bits leave out.

    The sum of two joined columns is there for the compiler: bits tested next to the logits are tested by every thread
    that holds one, and registers spill; a sum is made once and read by all.
    """
    length = tl.load(log_length_ptr + k_tile, mask=k_tile < k_tiles, other=float("-inf"))
    out = tl.where(_pooled_bits(bits_ptr, k_tile, k_tiles), 0.0, float("-inf"))
    return tl.sum(tl.join(length, out), 1)


# Sizes of the problem, not worth a kernel for each value that is 1 or a multiple of 16.
_INTEGERS = (
    "stride_gb", "stride_gh", "stride_hb", "num_q", "num_k", "heads", "key_heads", "q_tiles", "k_tiles", "table_last",
    "step", "stride_ib", "stride_ih", "stride_pb", "stride_ph",
)  # fmt: skip


@triton.jit
def _sums(
    out_ptr, lse_ptr, q_row, live, stride_os, STARTED: tl.constexpr, BLOCK_Q: tl.constexpr, DIM: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and output so far: of no key, or of those that an earlier kernel attended to."""
    m, total = tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    acc1, acc2 = tl.zeros([BLOCK_Q, D1], tl.float32), tl.zeros([BLOCK_Q, D2], tl.float32) if D2 > 0 else 0.0
    if STARTED:
        m = tl.load(lse_ptr + q_row, mask=live, other=float("-inf")) * 1.4426950408889634
        total = tl.where(m == float("-inf"), 0.0, 1.0)
        acc1, acc2 = _load(out_ptr, q_row, live, stride_os, True, DIM, D1, D2)
        acc1, acc2 = acc1.to(tl.float32), acc2.to(tl.float32) if D2 > 0 else acc2
    return m, total, acc1, acc2


@triton.jit
def _means(
    k_mean_ptr, v_mean_ptr, k_mean_desc, v_mean_desc, b, key_heads, hk, n, k_tile, k_tiles, BLOCK_P: tl.constexpr,
    DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DIM_V: tl.constexpr, D1V: tl.constexpr, D2V: tl.constexpr,
):  # fmt: skip
    """Mean keys and values of the tiles from ``n`` on; those beyond the end are zeros, or the last tile's."""
    if k_mean_desc is not None:
        k1, k2 = k_mean_desc.load([b, hk, n, 0]).reshape(BLOCK_P, D1), 0.0
        v1, v2 = v_mean_desc.load([b, hk, n, 0]).reshape(BLOCK_P, D1V), 0.0
    else:
        start, row = (b.to(tl.int64) * key_heads + hk) * k_tiles * DIM, tl.minimum(k_tile, k_tiles - 1)
        k1, k2 = _load(k_mean_ptr + start, row, row, DIM, False, DIM, D1, D2)
        v_start = start if DIM_V == DIM else start // DIM * DIM_V
        v1, v2 = _load(v_mean_ptr + v_start, row, row, DIM_V, False, DIM_V, D1V, D2V)
    return k1, k2, v1, v2


@triton.jit(do_not_specialize=_INTEGERS)
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,  # [B, H, S, D] by strides; lse [B, H, S_q] or None
    indices_ptr, bounds_ptr, q_order_ptr, entry_t_ptr,  # [nnz], [G, NQ, 6], [G, NQ], [nnz] or None
    token_order_ptr, valid_ptr, head_scale_ptr,  # [S], uint8 [B, S_k], [B or 1, H], or None
    table_ptr, q_frames_ptr, k_frames_ptr, pooled_t_ptr,  # [L], [S_q], [S_k], [F + 2, NK], or None
    entry_mask_ptr, mask_bits_ptr,  # int32 [nnz], [M, TILE_Q, words of TILE_K], or None
    pooled_bits_ptr, k_mean_ptr, v_mean_ptr, log_length_ptr,  # [G, NQ, W], [B, HK, NK, D] twice, [B, NK]; or None
    k_scale_ptr, mean_scale_ptr, centre_ptr,  # [B, HK, NK] twice and [B, HK, D] of keys in eight bits, or None
    words_ptr,  # int32 [B, H, NQ, SUBS_Q, W], need bits of votes by visit, or None
    k_desc, v_desc,  # descriptors of K and V [B, HK, S_k, D or Dv] in blocks of [1, 1, BLOCK_K, D or Dv], or None
    k_mean_desc, v_mean_desc,  # of their means, in blocks of BLOCK_P, or None
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os, stride_gb, stride_gh, stride_hb,
    stride_ib, stride_ih, stride_pb, stride_ph,
    num_q, num_k, heads, key_heads, q_tiles, k_tiles, table_last, scale, step, vote_threshold,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DIM_V: tl.constexpr, D1V: tl.constexpr, D2V: tl.constexpr,
    PRECISION: tl.constexpr, VOTE: tl.constexpr, STARTED: tl.constexpr,
):  # fmt: skip
    """Output and LSE of one part of one query tile.

    `step` is 1 or -1, the direction in which each section is visited. A chunk has BLOCK_K keys, BLOCK_S in
    the slow loop, which holds more for each key, and BLOCK_P in the pooled one. With `stride_ib` and `stride_ih`, of
    batch and head in exact entries, every batch and head has lists of its own, whose bounds are relative to that;
    `stride_pb` and `stride_ph` are those of the sets of pooled bits.
    VOTE is None or the criterion by which tiles vote. Where STARTED, output and LSE hold those of other keys for the
    same rows, and are written anew with both.
    """
    SUBS_Q: tl.constexpr = (TILE_Q + BLOCK_Q - 1) // BLOCK_Q
    SUBS_K: tl.constexpr = (TILE_K + BLOCK_K - 1) // BLOCK_K
    SUBS_S: tl.constexpr = (TILE_K + BLOCK_S - 1) // BLOCK_S
    bh, part = tl.program_id(0) // (q_tiles * SUBS_Q), tl.program_id(0) % (q_tiles * SUBS_Q)
    b, h, hk = bh // heads, bh % heads, bh % heads // (heads // key_heads)
    lists = (b * stride_gb + h * stride_gh).to(tl.int64) * q_tiles
    q_tile = tl.load(q_order_ptr + lists + part // SUBS_Q)
    if stride_ib is not None:
        lists = bh.to(tl.int64) * q_tiles
        base = b.to(tl.int64) * stride_ib + h.to(tl.int64) * stride_ih
        indices_ptr, entry_t_ptr = indices_ptr + base, _from(entry_t_ptr, base)
    bounds_ptr += (lists + q_tile) * 6
    start, end_plain, end_constant, end_slow = _sections(bounds_ptr)
    indices_ptr, entry_t_ptr = indices_ptr + start, _from(entry_t_ptr, start)
    batch, bhk = b.to(tl.int64), b.to(tl.int64) * key_heads + hk
    if stride_vs is None:  # K and V share the offsets of their rows, which saves the hot loop's registers
        stride_vs = stride_ks
    k_ptr += batch * stride_kb + hk.to(tl.int64) * stride_kh
    v_ptr += batch * stride_vb + hk.to(tl.int64) * stride_vh

    offset = part % SUBS_Q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token, live, q_row = _tokens(q_tile, offset, TILE_Q, num_q, token_order_ptr)
    q_ptr += batch * stride_qb + h.to(tl.int64) * stride_qh
    if head_scale_ptr is not None:
        scale *= tl.load(head_scale_ptr + b * stride_hb + h)
    q1, q2, row_scale = _scaled_queries(q_ptr, q_row, live, stride_qs, scale, DIM, D1, D2, k_ptr, k_scale_ptr)
    q_frame, first_frame, last_frame = _frames(q_frames_ptr, token, live)

    out_ptr += batch * stride_ob + h.to(tl.int64) * stride_oh
    lse_ptr = _from(lse_ptr, bh.to(tl.int64) * num_q)
    m, total, acc1, acc2 = _sums(out_ptr, lse_ptr, q_row, live, stride_os, STARTED, BLOCK_Q, DIM_V, D1V, D2V)
    if VOTE is not None:
        words_ptr += ((bh.to(tl.int64) * q_tiles + q_tile) * SUBS_Q + part % SUBS_Q) * ((k_tiles + 31) // 32)
        word, limit = tl.zeros([BLOCK_Q], tl.uint32), total + vote_threshold
        state, limit = _begin(limit, m, vote_threshold, VOTE)

    for constant in tl.static_range(2 if entry_t_ptr is not None else 1):  # plain tiles, then those of one t each
        begin, end = end_plain if constant else 0, end_constant if constant else end_plain
        origin = begin * SUBS_K if step > 0 else end * SUBS_K - 1
        ahead = tl.load(indices_ptr + origin // SUBS_K)
        for n in tl.range(0, (end - begin) * SUBS_K):
            k1, k2, v1, v2 = _keys_and_values(
                ahead, origin + n * step, k_ptr, v_ptr, k_desc, v_desc, b, hk, token_order_ptr, stride_ks, stride_vs,
                BLOCK_K, TILE_K, DIM, D1, D2, DIM_V, D1V, D2V,
            )  # fmt: skip
            factor = _with_keys(row_scale, k_scale_ptr, bhk * k_tiles + ahead)
            ahead = tl.load(indices_ptr + (origin + n * step + step) // SUBS_K)
            low = factor * tl.load(entry_t_ptr + (origin + n * step) // SUBS_K) if constant else factor
            x = _products(q1, q2, k1, k2, D2, PRECISION)
            top = tl.max(x, 1)
            top = tl.minimum(top * factor, top * low) if constant else top * factor  # min(s x, t s x) rises with x
            m_new = tl.maximum(m, top)
            gap = x * _beside(factor) - m_new[:, None]
            p = tl.exp2(tl.minimum(gap, x * _beside(low) - m_new[:, None]) if constant else gap)
            alpha = tl.exp2(m - m_new)
            total, acc1, acc2, mass = _add(p, alpha, total, acc1, acc2, v1, v2, D2V, PRECISION)
            if VOTE is not None:
                word, state, limit = _vote(
                    word, state, limit, begin, n, top, m, m_new, alpha, mass, total, vote_threshold,
                    words_ptr, live, VOTE, SUBS_K, False,
                )  # fmt: skip
            m = m_new

    if VOTE is not None:
        state, limit = _begin(limit, m, vote_threshold, VOTE)
    origin = end_constant * SUBS_S if step > 0 else end_slow * SUBS_S - 1
    for n in tl.range(0, (end_slow - end_constant) * SUBS_S, num_stages=1):
        position = origin + n * step
        k_offset = position % SUBS_S * BLOCK_S + tl.arange(0, BLOCK_S)
        tile = tl.load(indices_ptr + position // SUBS_S)
        key, here, k_row = _keys(tile, k_offset, TILE_K, num_k, batch, valid_ptr, token_order_ptr)
        k1, k2 = _load(k_ptr, k_row, here, stride_ks, True, DIM, D1, D2)
        v1, v2 = _load(v_ptr, k_row, here, stride_vs, True, DIM_V, D1V, D2V)
        x = _products(q1, q2, k1, k2, D2, PRECISION) * _beside(_with_keys(row_scale, k_scale_ptr, bhk * k_tiles + tile))
        if table_ptr is not None:
            k_frame = tl.load(k_frames_ptr + key, mask=here, other=-1)
            for frame in range(tl.maximum(first_frame, 0), last_frame + 1):
                distance = tl.minimum(tl.abs(k_frame - frame), table_last)
                t = tl.load(table_ptr + distance, mask=k_frame >= 0, other=1.0)
                x = _decay_rows(x, t, q_frame == frame)
        x = tl.where(here[None, :], x, float("-inf"))
        if entry_mask_ptr is not None:
            seen = _unmasked(entry_mask_ptr + start, mask_bits_ptr, position, offset, k_offset, BLOCK_S, TILE_Q, TILE_K)
            x = tl.where(seen, x, float("-inf"))
        m_new, total, acc1, acc2, top, alpha, mass = _add_masked(x, m, total, acc1, acc2, v1, v2, D2V, PRECISION)
        if VOTE is not None:
            word, state, limit = _vote(
                word, state, limit, end_constant, n, top, m, m_new, alpha, mass, total, vote_threshold,
                words_ptr, live, VOTE, SUBS_S, True,
            )  # fmt: skip
        m = m_new
    if VOTE is not None:
        _store_rest(words_ptr, end_slow, word, live)

    if pooled_bits_ptr is not None:
        first, end = _pooled_range(bounds_ptr, BLOCK_P)
        bits = pooled_bits_ptr + ((batch * stride_pb + h * stride_ph) * q_tiles + q_tile) * ((k_tiles + 31) // 32)
        for n in tl.range(first, end, BLOCK_P, num_stages=2):
            k_tile = n + tl.arange(0, BLOCK_P)
            bias = _pooled_bias(log_length_ptr + b * k_tiles, bits, k_tile, k_tiles)
            k1, k2, v1, v2 = _means(
                k_mean_ptr, v_mean_ptr, k_mean_desc, v_mean_desc, b, key_heads, hk, n, k_tile, k_tiles, BLOCK_P, DIM,
                D1, D2, DIM_V, D1V, D2V,
            )  # fmt: skip
            x = _products(q1, q2, k1, k2, D2, PRECISION) * _with_means(row_scale, mean_scale_ptr, bhk, k_tile, k_tiles)
            if pooled_t_ptr is not None:
                for frame in range(tl.maximum(first_frame, 0), last_frame + 1):
                    t = tl.load(pooled_t_ptr + (frame + 1) * k_tiles + k_tile, mask=k_tile < k_tiles, other=1.0)
                    x = _decay_rows(x, t, q_frame == frame)
            x += bias[None, :]
            m, total, acc1, acc2, _, _, _ = _add_masked(x, m, total, acc1, acc2, v1, v2, D2V, PRECISION)

    empty, total = total == 0, tl.where(total == 0, 1.0, total)  # rows without a key
    _store_part(out_ptr, q_row, live, stride_os, acc1 / total[:, None], 0, D1V, DIM_V)
    if D2V > 0:
        _store_part(out_ptr, q_row, live, stride_os, acc2 / total[:, None], D1V, D2V, DIM_V)
    if lse_ptr is not None:
        m = _with_centre(m + tl.log2(total), q_ptr, centre_ptr, bhk, q_row, live, stride_qs, scale, DIM, D1, D2)
        lse = tl.where(empty, float("-inf"), m * 0.6931471805599453)
        tl.store(lse_ptr + q_row, lse, mask=live)
