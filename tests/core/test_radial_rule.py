"""RadialAttention's raster rule: the published counts, a token-level brute force on odd sizes, and properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.rules.radial import RadialRule, cut, frame_period, half_width, kept_tiles


def rule(block_size=128, decay_factor=1.0, near="full", sink=False, boundary="published", order="raster"):
    return RadialRule(
        block_size=block_size, decay_factor=decay_factor, near=near, sink=sink, boundary=boundary, order=order
    )


def token_mask(r: RadialRule, distance: int, s: int, sink_pair: bool, threshold: int) -> np.ndarray:
    """The allowed (k, l) of one frame pair, token by token and with the original's floating-point arithmetic."""
    if sink_pair:
        return np.ones((s, s), bool)
    digits = len(f"{distance:b}") if distance else 0
    scale = 2 ** len(f"{s:b}") / 2**digits
    if scale < threshold and distance % int(threshold / scale):
        return np.zeros((s, s), bool)
    if distance == 0 or (distance == 1 and r.near == "full"):
        width = s
    elif distance == 1:
        width = s // 2
    else:
        width = max(r.block_size, r.decay_factor * scale)
    return np.abs(np.arange(s)[:, None] - np.arange(s)) <= width


def brute_published(r: RadialRule, frames: int, s: int) -> np.ndarray:
    """The original's procedure: every pair's token mask on a canvas, its tiles thresholded, then OR into the map."""
    b, tiles, side = r.block_size, -(-s // r.block_size), -(-frames * s // r.block_size)
    out = np.zeros((side + 1, side + 1), bool)
    for i in range(frames):
        for j in range(frames):
            row, column = i * s % b, j * s % b
            canvas = np.zeros((row + tiles * b, column + tiles * b), bool)
            canvas[row : row + s, column : column + s] = token_mask(r, abs(i - j), s, r.sink and j == 0, 128)
            density = canvas[: tiles * b, : tiles * b].reshape(tiles, b, tiles, b).mean(axis=1, dtype=np.float64)
            share = (density > 1 / 3).sum(axis=-1) / ((density > 0).sum(axis=-1) + 1e-9)
            top, left = i * s // b, j * s // b
            out[top : top + tiles, left : left + tiles] |= share > 0.6
    out[frames * s // b :] = True
    out[:, frames * s // b :] = True
    return out[:side, :side]


def brute_any(r: RadialRule, frames: int, s: int) -> np.ndarray:
    """Which tiles hold an allowed pair of tokens, from the token mask of the whole sequence."""
    b, n = r.block_size, frames * s
    side = -(-n // b)
    tokens = np.zeros((side * b, side * b), bool)
    threshold = min(128, 2 ** (len(f"{s:b}") - 1))
    for i in range(frames):
        for j in range(frames):
            pair = token_mask(r, abs(i - j), s, r.sink and j == 0, threshold)
            tokens[i * s : i * s + s, j * s : j * s + s] = pair
    return tokens.reshape(side, b, side, b).any(axis=(1, 3))


@st.composite
def grids(draw, most_tokens):
    """Frames and tokens a frame: aligned, odd, smaller than a tile, powers of two, few or many frames."""
    s = draw(st.one_of(st.integers(1, 300), st.sampled_from([16, 32, 64, 96, 128, 192, 255, 256, 257])))
    return draw(st.integers(2, max(2, min(70, most_tokens // s)))), s


settings_of_rule = {
    "near": st.sampled_from(["full", "half"]),
    "sink": st.booleans(),
    "decay_factor": st.sampled_from([0.2, 0.35, 0.5, 0.8, 0.95, 1.0]),
}


@given(
    grid=grids(2500),
    options=st.fixed_dictionaries({**settings_of_rule, "block_size": st.sampled_from([4, 8, 16, 32, 64, 128])}),
    boundary=st.sampled_from(["published", "any"]),
)
@settings(max_examples=200, deadline=None)
def test_tiles_equal_the_token_level_procedure(grid, options, boundary):
    """As published, and exactly those with an allowed pair."""
    r = rule(boundary=boundary, **options)
    brute = brute_published if boundary == "published" else brute_any
    np.testing.assert_array_equal(kept_tiles(r, grid[0], 1, grid[1]), brute(r, *grid))


def test_many_frames_and_long_frames_equal_the_brute_force():
    for frames, s, block_size in ((70, 130, 64), (40, 300, 128), (37, 257, 64), (66, 128, 16), (3, 3000, 128)):
        for boundary, brute in (("published", brute_published), ("any", brute_any)):
            r = rule(block_size=block_size, decay_factor=0.5, near="half", boundary=boundary)
            np.testing.assert_array_equal(kept_tiles(r, frames, 1, s), brute(r, frames, s))


WAN, HUNYUAN = True, False  # who has a sink


def test_published_counts_and_sparsities_to_the_digits_printed():
    for s, frames, decay, sink, near, kept, rows in (
        (3840, 18, 0.2, WAN, "half", 76_798, (78, 120, 106)),
        (3840, 18, 0.2, WAN, "full", 83_728, (92, 148, 120)),
        (3600, 64, 1.0, HUNYUAN, "full", 575_360, None),
        (256, 8, 1.0, WAN, "full", 232, None),
        (256, 8, 1.0, HUNYUAN, "full", 224, None),
    ):
        tiles = kept_tiles(rule(128, decay, near, sink), frames, 1, s)
        assert (len(tiles), tiles.sum()) == (frames * s / 128, kept)
        assert rows in (None, tuple(tiles[[0, len(tiles) // 2, -1]].sum(axis=1)))
    for s, frames, block_size, decay, sink, near, sparsity in (
        (3840, 18, 128, 0.2, WAN, "half", "0.7366324"),
        (3840, 18, 128, 0.2, WAN, "full", "0.7129"),
        (3840, 18, 128, 0.5, WAN, "full", "0.6611"),
        (3840, 18, 128, 1.0, WAN, "full", "0.5691"),
        (3600, 21, 128, 0.2, WAN, "full", "0.7378"),
        (3600, 21, 128, 1.0, WAN, "full", "0.6035"),
        (1560, 21, 128, 0.2, WAN, "full", "0.6613"),
        (1560, 21, 64, 0.2, WAN, "full", "0.7319"),
        (1560, 21, 128, 1.0, WAN, "full", "0.5551"),
        (3600, 41, 128, 1.0, WAN, "full", "0.7401"),
        (3840, 30, 128, 0.95, HUNYUAN, "full", "0.7254"),
        (3840, 30, 128, 0.95, WAN, "full", "0.6992"),
        (3600, 64, 128, 1.0, WAN, "full", "0.8083"),
        (3600, 128, 128, 1.0, WAN, "full", "0.8837"),
    ):
        whole = frames * s // block_size
        tiles = kept_tiles(rule(block_size, decay, near, sink), frames, 1, s)[:whole, :whole]
        assert f"{1 - tiles.mean():.{len(sparsity) - 2}f}" == sparsity


def own_frame_share(kept, frames, s, block_size):
    """For every piece: the share of its own frame's tokens that its tile sees; and its length."""
    pieces = cut(frames, s, block_size)
    length = pieces.last - pieces.first + 1
    same = pieces.frame[:, None] == pieces.frame
    return (kept[np.ix_(pieces.tile, pieces.tile)] & same) @ length / s, length


any_options = st.fixed_dictionaries({**settings_of_rule, "block_size": st.sampled_from([16, 64, 128])})
any_grid = st.tuples(st.integers(2, 40), st.integers(1, 30), st.integers(1, 40))


@given(grid=any_grid, options=any_options, order=st.sampled_from(["raster", "tiles"]))
@settings(max_examples=100, deadline=None)
def test_every_token_sees_its_whole_frame_and_no_row_is_empty(grid, options, order):
    frames, height, width = grid
    kept = kept_tiles(rule(boundary="any", order=order, **options), frames, height, width)
    share, _ = own_frame_share(kept, frames, height * width, options["block_size"])
    assert share.min() == 1.0
    assert kept.any(axis=1).all()
    if options["sink"]:
        assert kept[:, : -(-height * width // options["block_size"])].all()
    else:
        np.testing.assert_array_equal(kept, kept.T)


def test_the_scale_is_the_smallest_power_of_two_strictly_above_the_frame_and_the_least_band_a_tile():
    for s, power in ((255, 256), (256, 512), (257, 512), (3600, 4096), (3840, 4096), (1560, 2048)):
        assert half_width(rule(block_size=16), 2, s) == power // 4
        assert half_width(rule(block_size=16), 8, s) == power // 16
    assert half_width(rule(decay_factor=0.01), 2, 3600) == half_width(rule(decay_factor=1e-9), 2, 3600) == 128


def test_far_frames_are_thinned_from_128_whatever_the_tile():
    for s, periods in (
        (3600, {1: 1, 16: 1, 31: 1, 32: 2, 63: 2, 64: 4, 127: 4}),
        (1560, {1: 1, 8: 1, 15: 1, 16: 2, 32: 4, 64: 8}),
        (64, {1: 2, 2: 4, 8: 16}),
    ):
        for block_size in (64, 128):
            assert {d: frame_period(rule(block_size), d, s) for d in periods} == periods


def test_any_keeps_the_neighbours_of_frames_below_128_tokens():
    assert [frame_period(rule(boundary="any"), d, 64) for d in (0, 1, 2, 4, 8)] == [1, 1, 2, 4, 8]
    assert [frame_period(rule(boundary="any"), d, 3600) for d in (1, 16, 32, 64)] == [1, 1, 2, 4]


def test_the_kept_map_can_not_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        kept_tiles(rule(), 3, 16, 16)[0, 0] = False
