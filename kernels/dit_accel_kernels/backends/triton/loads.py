"""How kernels load rows, in two column parts, so that head dims need not be powers of 2, and what goes with rows."""

import triton
import triton.language as tl


@triton.jit
def _from(ptr, offset):
    """A pointer moved on, None where there is none."""
    return None if ptr is None else ptr + offset


@triton.jit
def _load_part(
    ptr, rows, live, stride, MASKED: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    """Columns START..START + WIDTH of some rows; zero beyond DIM and, if MASKED, in rows that are not live."""
    columns = START + tl.arange(0, WIDTH)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if MASKED:
        return tl.load(ptrs, mask=live[:, None] & (columns < DIM)[None, :], other=0.0)
    if START + WIDTH > DIM:
        return tl.load(ptrs, mask=(columns < DIM)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _load(ptr, rows, live, stride, MASKED: tl.constexpr, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Some rows of a [*, DIM] matrix as two column parts; the second is a dummy where D2 = 0."""
    a = _load_part(ptr, rows, live, stride, MASKED, 0, D1, DIM)
    return a, _load_part(ptr, rows, live, stride, MASKED, D1, D2, DIM) if D2 > 0 else 0.0


@triton.jit
def _seen(bits_ptr, mask_id, q_offset, k_word, bit, inside, TILE_Q: tl.constexpr, TILE_K: tl.constexpr):
    """Which pairs of a tile's queries and keys its mask lets through, all where its number is -1.

    Keys are bits of a word; what is not inside the tile may be either. All three broadcast against each other.
    """
    WORDS: tl.constexpr = (TILE_K + 31) // 32
    row = mask_id.to(tl.int64) * TILE_Q + q_offset
    word = tl.load(bits_ptr + row * WORDS + k_word, mask=(row >= 0) & inside, other=-1)
    return (word >> bit) & 1 != 0


@triton.jit
def _unmasked(
    entry_mask_ptr, bits_ptr, position, q_offset, k_offset, BLOCK: tl.constexpr, TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
):  # fmt: skip
    """`_seen` of query rows and one chunk of a list's keys, whose bits lie in one word."""
    tl.static_assert(BLOCK <= 32)
    SUBS: tl.constexpr = (TILE_K + BLOCK - 1) // BLOCK
    mask_id, word = tl.load(entry_mask_ptr + position // SUBS), position % SUBS * BLOCK // 32
    inside, bit = (q_offset < TILE_Q)[:, None], k_offset[None, :] % 32
    return _seen(bits_ptr, mask_id, q_offset[:, None], word, bit, inside, TILE_Q, TILE_K)


@triton.jit
def _token_rows(token, live, token_order_ptr):
    """Rows of the tensors that hold these tokens, which are in tiled order; row 0 where there is none."""
    return token if token_order_ptr is None else tl.load(token_order_ptr + token, mask=live, other=0)


@triton.jit
def _tokens(tile, offset, TILE: tl.constexpr, number, token_order_ptr):
    """The tokens at some offsets in a tile, which of them are there, and the rows that hold them."""
    token = tile * TILE + offset
    live = (offset < TILE) & (token < number)
    return token, live, _token_rows(token, live, token_order_ptr)


@triton.jit
def _keys(tile, offset, TILE: tl.constexpr, number, batch, valid_ptr, token_order_ptr):
    """`_tokens` of a batch, of which only the valid ones are there."""
    token = tile * TILE + offset
    live = _valid(valid_ptr, batch, number, token, (offset < TILE) & (token < number))
    return token, live, _token_rows(token, live, token_order_ptr)


@triton.jit
def _valid(valid_ptr, batch, number, token, live):
    """Which of some keys of a batch count, of those that are there."""
    return live if valid_ptr is None else live & (tl.load(valid_ptr + batch * number + token, mask=live, other=0) > 0)


@triton.jit
def _pair_decay(q_frame, k_frame, table_ptr, table_last):
    """Decay t of frames that broadcast against each other; 1 outside the video (frame -1)."""
    distance = tl.minimum(tl.abs(q_frame - k_frame), table_last)
    return tl.load(table_ptr + distance, mask=(q_frame >= 0) & (k_frame >= 0), other=1.0)


@triton.jit
def _load_near(ptr, stride, ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Columns START..START + WIDTH of ROWS rows in sequence, by 32-bit offsets that a loop keeps in registers."""
    columns = START + tl.arange(0, WIDTH)
    ptrs = ptr + (tl.arange(0, ROWS)[:, None] * stride.to(tl.int32) + columns[None, :])
    if START + WIDTH > DIM:
        return tl.load(ptrs, mask=(columns < DIM)[None, :], other=0.0)
    return tl.load(ptrs)
