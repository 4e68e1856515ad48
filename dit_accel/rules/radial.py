"""RadialAttention's mask rule in closed form: which tiles of a frame-major token grid are kept, by integer arithmetic.

Source: Radial Attention (arXiv 2506.19852), as its published code applies it: half-widths on the raster index by frame
distance, diagonal thinning of far frames, an optional sink on frame 0. No token mask is ever built: two pieces of
tiles inside one frame pair are two index intervals, and the rule between them is a few comparisons.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .patches import patch_walk

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]

DROPPED = -(2**26)
"""Half-width of a frame pair of which nothing is kept."""

THINNING = 128
"""Half-width below which far frames are thinned; the published code has this number literally, whatever its tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RadialRule:
    """The parameters that decide which tiles are kept; all set, none checked (the method's config does that)."""

    decay_factor: float  # scales the half-width of frames at distance 2 and more
    block_size: int  # B, tokens of a tile in queries and keys; also the least half-width
    near: Literal["full", "half"]  # half-width at frame distance 1, ``full`` = s or ``half`` = s // 2
    sink: bool  # every query also sees all of frame 0
    # ``any`` keeps a tile that holds any allowed pair of tokens, ``published`` rounds like the original
    boundary: Literal["any", "published"]
    order: Literal["raster", "tiles"]  # ``raster``, or ``tiles`` for spatial patches kept by their 2-D distance


class Pieces(NamedTuple):
    """The tiles of a sequence cut at the frame borders, in sequence order; all arrays have one entry per piece."""

    frame: Ints
    """Frame the piece lies in."""
    tile: Ints
    """Tile the piece belongs to."""
    first: Ints
    """Index of its first token inside the frame."""
    last: Ints
    """Index of its last token inside the frame."""
    bounds: npt.NDArray[np.intp]
    """[F + 1]: the pieces of frame i are ``bounds[i]`` up to ``bounds[i + 1]``."""


def half_width(rule: RadialRule, distance: int, tokens_per_frame: int) -> int:
    """Return w: tokens k, l of frames ``distance`` apart see each other if |k - l| <= w, unless it is thinned out.

    w(0) = s; w(1) = s or s // 2; w(d) = max(B, decay_factor * P / 2^L(d)), with L the number of binary digits and
    P = 2^L(s).
    """
    if distance == 0 or (distance == 1 and rule.near == "full"):
        return tokens_per_frame
    if distance == 1:
        return tokens_per_frame // 2
    scaled = rule.decay_factor * 2.0 ** (tokens_per_frame.bit_length() - distance.bit_length())
    return max(rule.block_size, int(min(scaled, tokens_per_frame)))


def frame_period(rule: RadialRule, distance: int, tokens_per_frame: int) -> int:
    """Return p: frames ``distance`` apart see each other only if p divides the distance.

    p = max(1, 128 * 2^L(d) // P). With ``boundary="any"`` the 128 becomes P / 2 for frames of fewer than 128 tokens:
    the original would drop even the neighbouring frame there.
    """
    digits = tokens_per_frame.bit_length()
    threshold = THINNING if rule.boundary == "published" else min(THINNING, 2 ** (digits - 1))
    return max(1, (threshold << distance.bit_length()) >> digits)


def reaches(rule: RadialRule, frames: int, tokens_per_frame: int) -> Ints:
    """Return the half-width by frame distance 0 .. F - 1, and `DROPPED` where thinning drops the frame pair."""
    s = tokens_per_frame
    widths = [DROPPED if d % frame_period(rule, d, s) else half_width(rule, d, s) for d in range(frames)]
    return np.array(widths, np.int32)


def cut(frames: int, tokens_per_frame: int, block_size: int) -> Pieces:
    """Cut ``frames`` frames of tokens into tiles of ``block_size`` and those at the frame borders."""
    s, n = tokens_per_frame, frames * tokens_per_frame
    starts = np.sort(np.concatenate([np.arange(0, n, block_size), np.arange(0, n, s)]).astype(np.int32))
    starts = starts[np.diff(starts, prepend=-1) > 0]
    frame = starts // s
    last = np.append(starts[1:], n) - 1 - frame * s
    return Pieces(frame, starts // block_size, starts - frame * s, last, np.searchsorted(frame, np.arange(frames + 1)))


@lru_cache(maxsize=4)
def kept_tiles(rule: RadialRule, frames: int, height: int, width: int) -> Bools:
    """Return which tiles of the F * Y * X visual tokens are kept, bool [N, N], N = ceil(F * Y * X / B); read-only.

    With ``boundary="published"`` rows and columns from floor(F * Y * X / B) on are all kept, as in the original.
    """
    pieces = cut(frames, height * width, rule.block_size)
    exact = (_patches if rule.order == "tiles" else _raster)(rule, pieces, frames, height, width)
    if rule.boundary == "published":
        tail = frames * height * width // rule.block_size
        exact[tail:] = True
        exact[:, tail:] = True
    exact.flags.writeable = False
    return exact


def _raster(rule: RadialRule, pieces: Pieces, frames: int, height: int, width: int) -> Bools:
    """Return which tiles meet by the raster rule, bool [N, N]: one query frame at a time against every key piece."""
    s, tiles_per_frame = height * width, -(-height * width // rule.block_size)
    by_distance = reaches(rule, frames, s)
    published = rule.boundary == "published"
    meets = partial(_meets_published, least=rule.block_size // 3 + 1) if published else _meets_any
    # The original's canvas holds ceil(s / B) tiles a frame: what an unaligned frame spills into one more is lost.
    spilled = pieces.tile - pieces.frame * s // rule.block_size >= tiles_per_frame
    hits = np.zeros((pieces.tile[-1] + 1, len(pieces.tile)), np.bool_)
    for frame in range(frames):
        reach = by_distance[np.abs(pieces.frame - frame)]
        if rule.sink:
            reach[pieces.frame == 0] = s
        start, stop = pieces.bounds[frame], pieces.bounds[frame + 1]
        if published:
            reach[spilled] = DROPPED
            stop = min(stop, start + tiles_per_frame)
        k0, k1 = pieces.first[start:stop, None], pieces.last[start:stop, None]
        top = pieces.tile[start]
        hits[top : top + stop - start] |= meets(k0, k1, pieces.first, pieces.last, reach)
    return np.logical_or.reduceat(hits, np.flatnonzero(np.diff(pieces.tile, prepend=-1)), axis=1)


def _meets_any(k0: Ints, k1: Ints, l0: Ints, l1: Ints, reach: Ints | np.int32 | int) -> Bools:
    """Tell whether any |k - l| <= reach with k in [k0, k1], l in [l0, l1]."""
    return (k0 - reach <= l1) & (k1 + reach >= l0)


def _meets_published(k0: Ints, k1: Ints, l0: Ints, l1: Ints, reach: Ints, least: int) -> Bools:
    """Return the original's verdict: of the columns with any allowed row, over 0.6 have over B / 3, ``least``, of them.

    Column l holds min(k1 - k0, k1 + w - l, l - k0 + w, 2 w) + 1 allowed rows, so both kinds of columns are intervals.
    """
    low, high = k0 - reach, k1 + reach
    touched = np.minimum(l1, high) - np.maximum(l0, low) + 1
    dense = np.minimum(l1, high - least + 1) - np.maximum(l0, low + least - 1) + 1
    tall = (k1 - k0 + 1 >= least) & (2 * reach + 1 >= least)
    return tall & (dense > 0) & (5 * dense > 3 * touched)


def _patches(rule: RadialRule, pieces: Pieces, frames: int, height: int, width: int) -> Bools:
    """Return which tiles meet in patch order, bool [N, N]: as many as the raster rule keeps, but the nearest in 2-D.

    The pair of frames (j, i) mirrors (i, j); frames whose tiles start at the same offsets share one result.
    Where tiles straddle frames, their pieces' neighbourhoods overlap more than raster bands do, so slightly fewer tiles
    are kept: under 3 % fewer from 20 tiles a frame on.
    """
    by_distance = reaches(rule, frames, height * width)
    phase = [int(start) for start in np.arange(frames) * height * width % rule.block_size]
    centres = _centres(patch_walk(height, width, rule.block_size), width, pieces)
    pieces_of = [slice(*pieces.bounds[i : i + 2]) for i in range(frames)]
    tiles_of = [slice(tile[0], tile[-1] + 1) for tile in (pieces.tile[part] for part in pieces_of)]
    exact = np.zeros((pieces.tile[-1] + 1,) * 2, np.bool_)
    known: dict[tuple[int, int, int], Bools] = {}
    for i in range(frames):
        for j in range(i, frames):
            reach = by_distance[j - i]
            if reach == DROPPED:
                continue
            key = (phase[i], phase[j], int(reach))
            if key not in known:
                known[key] = _nearest(pieces, pieces_of[i], pieces_of[j], centres, reach)
            exact[tiles_of[i], tiles_of[j]] |= known[key]
            exact[tiles_of[j], tiles_of[i]] |= known[key].T
    if rule.sink:
        exact[:, tiles_of[0]] = True
    return exact


def _nearest(pieces: Pieces, rows: slice, columns: slice, centres: Floats, reach: np.int32) -> Bools:
    """Return which pieces of two frames meet in patch order, bool [rows, columns].

    Their number is that of the raster rule. First come the pairs that share a place in the frame, so that every token
    sees its own place in every frame it sees at all, then those of the least distance between their centres.
    """
    k0, k1, l0, l1 = pieces.first[rows, None], pieces.last[rows, None], pieces.first[columns], pieces.last[columns]
    count = np.count_nonzero(_meets_any(k0, k1, l0, l1, reach))
    (y_q, x_q), (y_k, x_k) = centres[:, rows], centres[:, columns]
    distance = (y_q[:, None] - y_k) ** 2 + (x_q[:, None] - x_k) ** 2
    distance[_meets_any(k0, k1, l0, l1, 0)] = -np.inf
    farthest = np.partition(distance, count - 1, axis=None)[count - 1]
    met = distance < farthest
    ties = np.flatnonzero(distance == farthest)
    met.flat[ties[: count - np.count_nonzero(met)]] = True
    return met


def _centres(walk: npt.NDArray[np.int64], width: int, pieces: Pieces) -> Floats:
    """Return the centres of all pieces, [2, pieces]: y, then x, in tokens."""
    sums = np.concatenate([np.zeros((2, 1)), np.cumsum(np.divmod(walk, width), axis=1)], axis=1)
    return (sums[:, pieces.last + 1] - sums[:, pieces.first]) / (pieces.last - pieces.first + 1)
