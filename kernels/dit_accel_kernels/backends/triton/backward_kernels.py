"""Device code of the backward: the kernels that recompute softmax weights from the LSE (see backward.py).

With p = exp(x - lse) and x = min(s, t s): grad_v = p' grad_out, grad_s = p (grad_out v' - delta), times t where
s > t s. 16-bit calls keep logits and LSE in base 2, which saves a product for each; in float32 that product's rounding
would be most of the error, so they stay natural there. An LSE of 10 rounded to float32 alone is off by 5e-7, and so
would be every weight of its row: the kernel of grad_q adds up the weights and leaves `norm`, one over their sum, to the
others. Source: FlashAttention-2, arXiv 2307.08691, algorithm 2; lists, pools and decay are ours.
"""

import triton
import triton.language as tl

from .forward import _full_chunk, _pooled_bits, _pooled_range, _store_part
from .loads import _from, _keys, _load_part, _pair_decay, _seen, _tokens, _unmasked, _valid
from .votes import _sections


@triton.jit
def _weights(x, t, base, norm, grad_p, delta, DECAY: tl.constexpr, NATURAL: tl.constexpr):
    """Softmax weights and gradient of the logits, from logits before decay, and LSE, norm and delta along one axis."""
    y = x
    if DECAY:
        y = tl.minimum(x, x * t)
    p = tl.exp(y - base) * norm if NATURAL else tl.exp2(y - base)
    grad = p * (grad_p - delta)
    if DECAY:
        grad *= tl.where(x > x * t, t, 1.0)
    return p, grad


@triton.jit
def _unit(NATURAL: tl.constexpr):
    """What a logit of the kernels' base is in natural units: 1 or ln 2."""
    return 1.0 if NATURAL else 0.6931471805599453


@triton.jit
def _mass(base, length, NATURAL: tl.constexpr):
    """LSE less the log of a pooled tile's length, which may be 0: +inf, weight 0."""
    return base - (tl.log(length) if NATURAL else tl.log2(length))


@triton.jit
def _add_query_grad(dq, totals, q, grad, k, v, t, scale, base, delta, DECAY: tl.constexpr, PRECISION: tl.constexpr):
    """grad_q and, in float32, sums of weights after one more chunk of keys in which nothing is missing."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    natural: tl.constexpr = q.dtype == tl.float32
    p, grad_s = _weights(x, t, base[:, None], 1.0, grad_p, delta[:, None], DECAY, natural)
    if natural:
        totals += p
    return tl.dot(grad_s.to(k.dtype), k, dq, input_precision=PRECISION), totals


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr,  # [B, H, S, D] by strides; v and grad have Dv columns
    base_ptr, delta_ptr, norm_ptr,  # [B, H, S_q]; norm is written in float32, else None
    indices_ptr, bounds_ptr, q_order_ptr, entry_t_ptr,  # [nnz], [G, NQ, 6], [G, NQ], [nnz] or None
    token_order_ptr, valid_ptr, head_scale_ptr,  # [S], uint8 [B, S_k], [B or 1, H], or None
    table_ptr, q_frames_ptr, k_frames_ptr, pooled_t_ptr,  # [L], [S_q], [S_k], [F + 2, NK], or None
    entry_mask_ptr, mask_bits_ptr,  # int32 [nnz], [M, TILE_Q, words of TILE_K], or None
    pooled_bits_ptr, k_mean_ptr, v_mean_ptr, length_ptr,  # [G, NQ, W], [B, HK, NK, D] twice, [B, NK], or None
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os, stride_dqb, stride_dqh, stride_dqs, stride_gb, stride_gh, stride_hb,
    stride_ib, stride_ih, stride_pb, stride_ph,  # as in the forward kernel
    num_q, num_k, heads, key_heads, q_tiles, k_tiles, table_last, scale,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q of one part of one query tile; lists as the forward kernel reads them."""
    NATURAL: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    SUBS_Q: tl.constexpr = (TILE_Q + BLOCK_Q - 1) // BLOCK_Q
    SUBS_K: tl.constexpr = TILE_K // BLOCK_K
    SUBS_S: tl.constexpr = (TILE_K + BLOCK_S - 1) // BLOCK_S  # chunks of the loops with masks are smaller
    bh, part = tl.program_id(0) // (q_tiles * SUBS_Q), tl.program_id(0) % (q_tiles * SUBS_Q)
    b, h = bh // heads, bh % heads
    hk = (h // (heads // key_heads)).to(tl.int64)
    lists = (b * stride_gb + h * stride_gh).to(tl.int64) * q_tiles
    q_tile = tl.load(q_order_ptr + lists + part // SUBS_Q)
    if stride_ib is not None:
        lists = bh.to(tl.int64) * q_tiles
        entries = b.to(tl.int64) * stride_ib + h.to(tl.int64) * stride_ih
        indices_ptr, entry_t_ptr = indices_ptr + entries, _from(entry_t_ptr, entries)
    bounds_ptr += (lists + q_tile) * 6
    batch, head = b.to(tl.int64), h.to(tl.int64)
    k_ptr += batch * stride_kb + hk * stride_kh
    v_ptr += batch * stride_vb + hk * stride_vh
    offset = part % SUBS_Q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token, live, q_row = _tokens(q_tile, offset, TILE_Q, num_q, token_order_ptr)
    q = _load_part(q_ptr + batch * stride_qb + head * stride_qh, q_row, live, stride_qs, True, 0, BLOCK_D, DIM)
    grad_ptr += batch * stride_ob + head * stride_oh
    grad = _load_part(grad_ptr, q_row, live, stride_os, True, 0, BLOCK_DV, DIM_V)
    base = tl.load(base_ptr + bh.to(tl.int64) * num_q + q_row, mask=live, other=float("inf"))
    delta = tl.load(delta_ptr + bh.to(tl.int64) * num_q + q_row, mask=live, other=0.0)
    if head_scale_ptr is not None:
        scale *= tl.load(head_scale_ptr + b * stride_hb + h)
    if table_ptr is not None:
        q_frame = tl.load(q_frames_ptr + token, mask=live, other=-1)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    totals = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)  # a row's sum in as many parts as a chunk has keys
    start, end_plain, end_constant, end_slow = _sections(bounds_ptr)
    indices_ptr, entry_t_ptr = indices_ptr + start, _from(entry_t_ptr, start)
    entry_mask_ptr = _from(entry_mask_ptr, start)

    ahead = tl.load(indices_ptr)
    for constant in tl.static_range(2 if entry_t_ptr is not None else 1):  # plain tiles, then those of one t each
        for n in tl.range(end_plain * SUBS_K if constant else 0, (end_constant if constant else end_plain) * SUBS_K):
            first = ahead.to(tl.int64) * TILE_K + n % SUBS_K * BLOCK_K
            _, k, _, v, _ = _full_chunk(
                first, k_ptr, v_ptr, token_order_ptr, stride_ks, stride_vs, BLOCK_K, DIM, BLOCK_D, 0, DIM_V, BLOCK_DV,
                0,
            )  # fmt: skip
            ahead = tl.load(indices_ptr + (n + 1) // SUBS_K)
            t = tl.load(entry_t_ptr + n // SUBS_K) if constant else 1.0
            dq, totals = _add_query_grad(dq, totals, q, grad, k, v, t, scale, base, delta, constant == 1, PRECISION)

    total = tl.sum(totals, 1)
    for n in tl.range(end_constant * SUBS_S, end_slow * SUBS_S, num_stages=1):
        k_offset = n % SUBS_S * BLOCK_S + tl.arange(0, BLOCK_S)
        tile = tl.load(indices_ptr + n // SUBS_S)
        key, here, k_row = _keys(tile, k_offset, TILE_K, num_k, batch, valid_ptr, token_order_ptr)
        k = _load_part(k_ptr, k_row, here, stride_ks, True, 0, BLOCK_D, DIM)
        v = _load_part(v_ptr, k_row, here, stride_vs, True, 0, BLOCK_DV, DIM_V)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        t = 1.0
        if table_ptr is not None:
            k_frame = tl.load(k_frames_ptr + key, mask=here, other=-1)
            t = _pair_decay(q_frame[:, None], k_frame[None, :], table_ptr, table_last)
        pair_base = base[:, None]
        if entry_mask_ptr is not None:
            seen = _unmasked(entry_mask_ptr, mask_bits_ptr, n, offset, k_offset, BLOCK_S, TILE_Q, TILE_K)
            pair_base = tl.where(seen, pair_base, float("inf"))
        p, grad_s = _weights(x, t, pair_base, 1.0, grad_p, delta[:, None], table_ptr is not None, NATURAL)
        if NATURAL:
            total += tl.sum(tl.where(here[None, :], p, 0.0), 1)
        grad_s = tl.where(here[None, :], grad_s, 0.0)
        dq = tl.dot(grad_s.to(k.dtype), k, dq, input_precision=PRECISION)

    if pooled_bits_ptr is not None:
        pooled, pooled_end = _pooled_range(bounds_ptr, BLOCK_S)
        bits = pooled_bits_ptr + ((batch * stride_pb + h * stride_ph) * q_tiles + q_tile) * ((k_tiles + 31) // 32)
        means = (batch * key_heads + hk) * k_tiles
        for n in tl.range(pooled, pooled_end, BLOCK_S, num_stages=1):
            k_tile = n + tl.arange(0, BLOCK_S)
            inside = k_tile < k_tiles
            length = tl.load(length_ptr + batch * k_tiles + k_tile, mask=inside, other=0.0)
            length = tl.where(_pooled_bits(bits, k_tile, k_tiles), length, 0.0)
            k = _load_part(k_mean_ptr + means * DIM, k_tile, inside, DIM, True, 0, BLOCK_D, DIM)
            v = _load_part(v_mean_ptr + means * DIM_V, k_tile, inside, DIM_V, True, 0, BLOCK_DV, DIM_V)
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            t = 1.0
            if pooled_t_ptr is not None:
                at = (q_frame[:, None] + 1) * k_tiles + k_tile[None, :]
                t = tl.load(pooled_t_ptr + at, mask=inside[None, :], other=1.0)
            mass = _mass(base[:, None], length[None, :], NATURAL)
            p, grad_s = _weights(x, t, mass, 1.0, grad_p, delta[:, None], pooled_t_ptr is not None, NATURAL)
            if NATURAL:
                total += tl.sum(p, 1)
            dq = tl.dot(grad_s.to(k.dtype), k, dq, input_precision=PRECISION)

    if NATURAL:
        norm = 1.0 / tl.where(total > 0, total, 1.0)  # 0 in rows without a key
        dq *= norm[:, None]
        tl.store(norm_ptr + bh.to(tl.int64) * num_q + q_row, norm, mask=live)
    dq_ptr += batch * stride_dqb + head * stride_dqh
    _store_part(dq_ptr, q_row, live, stride_dqs, dq * (scale * _unit(NATURAL)), 0, BLOCK_D, DIM)


@triton.jit
def _add_key_grads(
    dk, dv, k, v, q, grad, t, scale, head_scale, base, norm, delta, DECAY: tl.constexpr, SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v after one more chunk of query rows; pairs that are missing come with base = inf."""
    x = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
    grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    natural: tl.constexpr = q.dtype == tl.float32
    p, grad_s = _weights(x, t, base, norm, grad_p, delta[None, :], DECAY, natural)
    if SHARED:
        grad_s *= head_scale
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    dk = tl.dot(grad_s.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, dk_ptr, dv_ptr,  # [B, H, S, D] by strides; v, grad and dv have Dv columns
    base_ptr, delta_ptr, norm_ptr,  # [B, H, S_q]; the last in float32 only
    q_tiles_ptr, bounds_ptr, order_ptr, entry_t_ptr,  # [nnz], [G, NK, 3], [G', NK], [nnz] or None
    token_order_ptr, valid_ptr, head_scale_ptr,  # [S], uint8 [B, S_k], [B or 1, H], or None
    table_ptr, q_frames_ptr, k_frames_ptr,  # [L], [S_q], [S_k], or None
    entry_mask_ptr, mask_bits_ptr,  # as in the kernel of grad_q
    dk_mean_ptr, dv_mean_ptr, length_ptr,  # float32 [B, HK, NK, D] and [.., Dv], [B, NK], or None
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    stride_gb, stride_gh, stride_nb, stride_nh, stride_hb, stride_ib, stride_ih,  # the last two as in ColumnPlan
    num_q, num_k, heads, key_heads, k_tiles, table_last, scale,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of one part of one key tile, over all query heads of its key head."""
    SUBS_Q: tl.constexpr = TILE_Q // BLOCK_Q
    SUBS_S: tl.constexpr = (TILE_Q + BLOCK_S - 1) // BLOCK_S  # chunks of the loop with masks are smaller
    SUBS_K: tl.constexpr = (TILE_K + BLOCK_K - 1) // BLOCK_K
    bh, part = tl.program_id(0) // (k_tiles * SUBS_K), tl.program_id(0) % (k_tiles * SUBS_K)
    b, hk = bh // key_heads, bh % key_heads
    batch = b.to(tl.int64)
    k_tile = tl.load(order_ptr + (b * stride_nb + hk * stride_nh).to(tl.int64) * k_tiles + part // SUBS_K)
    offset = part % SUBS_K * BLOCK_K + tl.arange(0, BLOCK_K)
    key, here, k_row = _tokens(k_tile, offset, TILE_K, num_k, token_order_ptr)
    valid = _valid(valid_ptr, batch, num_k, key, here)
    head = hk.to(tl.int64)
    k = _load_part(k_ptr + batch * stride_kb + head * stride_kh, k_row, valid, stride_ks, True, 0, BLOCK_D, DIM)
    v = _load_part(v_ptr + batch * stride_vb + head * stride_vh, k_row, valid, stride_vs, True, 0, BLOCK_DV, DIM_V)
    if table_ptr is not None:
        k_frame = tl.load(k_frames_ptr + key, mask=here, other=-1)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)

    repeat = heads // key_heads
    for h in range(hk * repeat, (hk + 1) * repeat):
        head_scale = tl.load(head_scale_ptr + b * stride_hb + h) if head_scale_ptr is not None else 1.0
        head_q_ptr = q_ptr + batch * stride_qb + tl.cast(h, tl.int64) * stride_qh
        head_grad_ptr = grad_ptr + batch * stride_ob + tl.cast(h, tl.int64) * stride_oh
        bh_rows = (batch * heads + h) * num_q
        list_ptr = bounds_ptr + ((b * stride_gb + h * stride_gh).to(tl.int64) * k_tiles + k_tile) * 3
        start = tl.load(list_ptr)  # 64-bit; from there on 32 bits hold every position times a tile
        end_plain, end = (tl.load(list_ptr + 1) - start).to(tl.int32), (tl.load(list_ptr + 2) - start).to(tl.int32)
        if stride_ib is not None:
            start += batch * stride_ib + tl.cast(h, tl.int64) * stride_ih
        head_q_tiles_ptr, head_t_ptr = q_tiles_ptr + start, _from(entry_t_ptr, start)
        head_mask_ptr = _from(entry_mask_ptr, start)
        ahead = tl.load(head_q_tiles_ptr)
        for n in tl.range(0, end_plain * SUBS_Q):
            first = ahead.to(tl.int64) * TILE_Q + n % SUBS_Q * BLOCK_Q
            q_row, q, _, grad, _ = _full_chunk(
                first, head_q_ptr, head_grad_ptr, token_order_ptr, stride_qs, stride_os, BLOCK_Q, DIM, BLOCK_D, 0,
                DIM_V, BLOCK_DV, 0,
            )  # fmt: skip
            ahead = tl.load(head_q_tiles_ptr + (n + 1) // SUBS_Q)
            base, delta = tl.load(base_ptr + bh_rows + q_row), tl.load(delta_ptr + bh_rows + q_row)
            norm = tl.load(norm_ptr + bh_rows + q_row)[None, :] if norm_ptr is not None else 1.0
            t = tl.load(head_t_ptr + n // SUBS_Q) if entry_t_ptr is not None else 1.0
            dk, dv = _add_key_grads(
                dk, dv, k, v, q, grad, t, scale * head_scale, head_scale, base[None, :], norm, delta,
                entry_t_ptr is not None, head_scale_ptr is not None, PRECISION,
            )  # fmt: skip
        for n in tl.range(end_plain * SUBS_S, end * SUBS_S, num_stages=1):
            q_offset = n % SUBS_S * BLOCK_S + tl.arange(0, BLOCK_S)
            q_tile = tl.load(head_q_tiles_ptr + n // SUBS_S)
            token, live, q_row = _tokens(q_tile, q_offset, TILE_Q, num_q, token_order_ptr)
            q = _load_part(head_q_ptr, q_row, live, stride_qs, True, 0, BLOCK_D, DIM)
            grad = _load_part(head_grad_ptr, q_row, live, stride_os, True, 0, BLOCK_DV, DIM_V)
            base = tl.load(base_ptr + bh_rows + q_row, mask=live, other=float("inf"))
            delta = tl.load(delta_ptr + bh_rows + q_row, mask=live, other=0.0)
            t = 1.0
            norm = 1.0 if norm_ptr is None else tl.load(norm_ptr + bh_rows + q_row, mask=live, other=1.0)[None, :]
            if table_ptr is not None:
                q_frame = tl.load(q_frames_ptr + token, mask=live, other=-1)
                t = _pair_decay(q_frame[None, :], k_frame[:, None], table_ptr, table_last)
            pair_base = base[None, :]
            if entry_mask_ptr is not None:
                inside = (q_offset < TILE_Q)[None, :] & (offset < TILE_K)[:, None]
                mask_id, word, bit = tl.load(head_mask_ptr + n // SUBS_S), offset[:, None] // 32, offset[:, None] % 32
                seen = _seen(mask_bits_ptr, mask_id, q_offset[None, :], word, bit, inside, TILE_Q, TILE_K)
                pair_base = tl.where(seen, pair_base, float("inf"))
            dk, dv = _add_key_grads(
                dk, dv, k, v, q, grad, t, scale * head_scale, head_scale, pair_base, norm, delta,
                table_ptr is not None, head_scale_ptr is not None, PRECISION,
            )  # fmt: skip

    dk *= scale * _unit(q_ptr.dtype.element_ty == tl.float32)
    if dk_mean_ptr is not None:
        columns, columns_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        dk_mean_ptr += (bh.to(tl.int64) * k_tiles + k_tile) * DIM
        dv_mean_ptr += (bh.to(tl.int64) * k_tiles + k_tile) * DIM_V
        spread = 1.0 / tl.maximum(tl.load(length_ptr + batch * k_tiles + k_tile), 1.0)
        dk += tl.load(dk_mean_ptr + columns, mask=columns < DIM, other=0.0)[None, :] * spread
        dv += tl.load(dv_mean_ptr + columns_v, mask=columns_v < DIM_V, other=0.0)[None, :] * spread
    dk, dv = tl.where(valid[:, None], dk, 0.0), tl.where(valid[:, None], dv, 0.0)
    _store_part(dk_ptr + batch * stride_dkb + head * stride_dkh, k_row, here, stride_dks, dk, 0, BLOCK_D, DIM)
    _store_part(dv_ptr + batch * stride_dvb + head * stride_dvh, k_row, here, stride_dvs, dv, 0, BLOCK_DV, DIM_V)


@triton.jit
def _pooled_dkdv_kernel(
    q_ptr, grad_ptr, base_ptr, delta_ptr, norm_ptr, k_mean_ptr, v_mean_ptr, length_ptr,  # as in the kernels above
    dk_mean_ptr, dv_mean_ptr, bits_ptr,  # float32 [B, HK, NK, D] and [.., Dv], int32 [G, NQ, words]
    token_order_ptr, head_scale_ptr, q_frames_ptr, pooled_t_ptr,  # [S], [B or 1, H], [S_q], [F + 2, NK], or None
    stride_qb, stride_qh, stride_qs, stride_ob, stride_oh, stride_os, stride_gb, stride_gh, stride_hb,
    num_q, heads, key_heads, q_tiles, k_tiles, words, scale,
    TILE_Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WORD: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the means of BLOCK_K key tiles of one key head, over all query tiles that pool any of them.

    BLOCK_K divides WORD, the tiles of a word of the bitmap.
    """
    NATURAL: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    SUBS_Q: tl.constexpr = (TILE_Q + BLOCK_Q - 1) // BLOCK_Q
    PARTS: tl.constexpr = WORD // BLOCK_K
    bh, part = tl.program_id(0) // (words * PARTS), tl.program_id(0) % (words * PARTS)
    word = part // PARTS
    b, hk = bh // key_heads, bh % key_heads
    batch = b.to(tl.int64)
    bit = part % PARTS * BLOCK_K + tl.arange(0, BLOCK_K)
    k_tile = word * WORD + bit
    inside = k_tile < k_tiles
    length = tl.load(length_ptr + batch * k_tiles + k_tile, mask=inside, other=0.0)
    means = bh.to(tl.int64) * k_tiles * DIM
    v_means = means if DIM_V == DIM else means // DIM * DIM_V
    k = _load_part(k_mean_ptr + means, k_tile, inside, DIM, True, 0, BLOCK_D, DIM)
    v = _load_part(v_mean_ptr + v_means, k_tile, inside, DIM_V, True, 0, BLOCK_DV, DIM_V)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)

    repeat = heads // key_heads
    for h in range(hk * repeat, (hk + 1) * repeat):
        head_scale = tl.load(head_scale_ptr + b * stride_hb + h) if head_scale_ptr is not None else 1.0
        head_q_ptr = q_ptr + batch * stride_qb + tl.cast(h, tl.int64) * stride_qh
        head_grad_ptr = grad_ptr + batch * stride_ob + tl.cast(h, tl.int64) * stride_oh
        bh_rows = (batch * heads + h) * num_q
        group_ptr = bits_ptr + (b * stride_gb + h * stride_gh).to(tl.int64) * q_tiles * words + word
        for n in tl.range(0, q_tiles * SUBS_Q, num_stages=1):
            bits = tl.load(group_ptr + n // SUBS_Q * words)
            if bits != 0:
                offset = n % SUBS_Q * BLOCK_Q + tl.arange(0, BLOCK_Q)
                token, live, q_row = _tokens(n // SUBS_Q, offset, TILE_Q, num_q, token_order_ptr)
                q = _load_part(head_q_ptr, q_row, live, stride_qs, True, 0, BLOCK_D, DIM)
                grad = _load_part(head_grad_ptr, q_row, live, stride_os, True, 0, BLOCK_DV, DIM_V)
                base = tl.load(base_ptr + bh_rows + q_row, mask=live, other=float("inf"))
                delta = tl.load(delta_ptr + bh_rows + q_row, mask=live, other=0.0)
                pooled = ((bits >> bit) & 1) > 0
                mass = _mass(base[None, :], tl.where(pooled, length, 0.0)[:, None], NATURAL)
                t = 1.0
                norm = 1.0 if norm_ptr is None else tl.load(norm_ptr + bh_rows + q_row, mask=live, other=1.0)[None, :]
                if pooled_t_ptr is not None:
                    q_frame = tl.load(q_frames_ptr + token, mask=live, other=-1)
                    at = (q_frame[None, :] + 1) * k_tiles + k_tile[:, None]
                    t = tl.load(pooled_t_ptr + at, mask=inside[:, None], other=1.0)
                x = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * head_scale)
                grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
                p, grad_s = _weights(x, t, mass, norm, grad_p, delta[None, :], pooled_t_ptr is not None, NATURAL)
                dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
                dk = tl.dot((grad_s * head_scale).to(q.dtype), q, dk, input_precision=PRECISION)

    _store_part(dk_mean_ptr + means, k_tile, inside, DIM, dk * (scale * _unit(NATURAL)), 0, BLOCK_D, DIM)
    _store_part(dv_mean_ptr + v_means, k_tile, inside, DIM_V, dv, 0, BLOCK_DV, DIM_V)
