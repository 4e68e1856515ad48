"""RadialAttention: its config and lists, the published rule by a token-level brute force, and its order in patches."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch
from dit_accel_kernels import EXACT, POOLED, SKIPPED, block_sparse_attention
from hypothesis import example, given, settings
from hypothesis import strategies as st
from one_layer import layout_of

from dit_accel.errors import ConfigError
from dit_accel.methods.attention import radial
from dit_accel.methods.attention.radial import RadialAttention
from dit_accel.plan.layout import TokenLayout
from dit_accel.rules.patches import patch_walk
from dit_accel.rules.radial import RadialRule, _meets_published, frame_period, half_width, kept_tiles, reaches

WAN_720P = TokenLayout(frames=21, height=45, width=80)


def counts(radial: RadialAttention, layout: TokenLayout) -> tuple[int, int]:
    """Kept visual tiles, and all of them."""
    kept = radial.kept(layout)
    return int(kept.sum()), kept.size


def test_unset_options_take_the_recipe_then_the_method_s_value():
    recipe = {"decay_factor": 0.8, "block_size": 64, "sink": False}
    resolved = RadialAttention(decay_factor=0.3, rest="pooled").filled(recipe)
    assert resolved == RadialAttention(
        block_size=64, decay_factor=0.3, near="full", sink=False, rest="pooled", boundary="any", order="raster",
        dense_steps=0.24, dense_last_steps=0, dense_layers=1, dense_above_sigma=None,
    )  # fmt: skip
    resolved = RadialAttention(sink=False, dense_steps=0).filled({"sink": True, "dense_steps": 12})
    assert (resolved.sink, resolved.dense_steps) == (False, 0)
    assert RadialAttention().filled().to_dict().items() >= dict(RadialAttention.defaults).items()
    for first, expected in ((None, 0), (2, 2)):  # a noise level stands in place of the recipe's first steps
        assert RadialAttention(dense_above_sigma=0.9, dense_steps=first).filled(recipe).dense_steps == expected


def test_a_wrong_recipe_and_one_frame_are_refused():
    for recipe, text in (
        ({"order": "tiles"}, r"recipe.*radial.*'order'.*block_size"),
        ({"decay": 0.5}, r"recipe.*radial.*'decay'.*'decay_factor'\?"),
        ({"decay_factor": -0.5}, r"radial\.decay_factor.*got -0\.5"),
    ):
        with pytest.raises(ConfigError, match=text):
            RadialAttention().filled(recipe)
    for call in ("tiles", "density", "kept", "advice"):
        with pytest.raises(ConfigError, match=r"radial.*2 latent frames, got 1 "):
            getattr(RadialAttention().filled(), call)(layout_of((1, 64, 64)))


@given(
    grid=st.tuples(st.integers(2, 12), st.integers(1, 20), st.integers(1, 20)),
    text=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    block_size=st.sampled_from([16, 64]),
    rest=st.sampled_from(["skip", "pooled"]),
    order=st.sampled_from(["raster", "tiles"]),
)
@settings(max_examples=30, deadline=None)
def test_text_is_exact_and_the_rest_is_as_asked(grid, text, block_size, rest, order):
    layout, alone = layout_of(grid, text), layout_of(grid)
    radial = RadialAttention(
        block_size=block_size, sink=False, decay_factor=0.2, near="half", rest=rest, order=order
    ).filled()
    lists = radial.tiles(layout).validate()
    assert (lists.num_q, lists.num_k, lists.block_q, lists.block_k) == (layout.tokens,) * 2 + (block_size,) * 2
    states, whole = lists.states()[0].numpy(), layout.visual_tokens // block_size
    np.testing.assert_array_equal(states, states.T)
    if sum(text):
        assert (states[whole:] == EXACT).all()
    else:
        assert counts(radial, layout) == (lists.tiles_exact, lists.tiles_total)
        assert radial.density(layout) == lists.density
    assert set(np.unique(states)) <= {EXACT, POOLED if rest == "pooled" else SKIPPED}
    np.testing.assert_array_equal(states[:whole, :whole], radial.tiles(alone).states()[0].numpy()[:whole, :whole])
    assert counts(radial, layout) == counts(radial, alone)


def test_published_counts_whole_tiles_only_and_its_list_holds_the_tail():
    published = RadialAttention(boundary="published", decay_factor=0.2, near="full", sink=True).filled()
    kept, total = counts(published, WAN_720P)
    assert total == 590**2
    assert f"{1 - kept / total:.4f}" == "0.7378"
    states = published.tiles(WAN_720P).states()[0]
    assert states.shape == (591, 591)
    assert (states[590] == EXACT).all()
    assert (states[:, 590] == EXACT).all()
    assert counts(RadialAttention(boundary="published").filled(), layout_of((2, 5, 5))) == (1, 1)


def test_lists_are_cached_by_what_decides_them():
    layout, config = layout_of((5, 12, 20)), RadialAttention(order="tiles", block_size=32)
    first, order = config.filled().tiles(layout), config.filled().token_order(layout)
    assert config.filled().token_order(layout) is order
    for changes, size, same in (
        ({"dense_steps": 7, "sink": True}, (5, 12, 20), True),
        ({"sink": False}, (5, 12, 20), False),
        ({"rest": "pooled"}, (5, 12, 20), False),
        ({}, (5, 20, 12), False),
    ):
        assert (dataclasses.replace(config, **changes).filled().tiles(layout_of(size)) is first) == same
    assert radial._tiles.cache_info().maxsize < 64


def test_advice_names_what_does_not_fit():
    """The original's rounding can drop every tile of a video within one."""
    assert RadialAttention().filled().advice(WAN_720P) is None
    mochi = {"boundary": "published", "block_size": 64, "sink": False}
    for options, size, text in (
        ({}, (2, 8, 8), r"radial.*1 tiles.*128 visual"),
        ({"block_size": 16}, (9, 16, 16), r"radial.*20000.*2304"),
        (mochi, (28, 30, 53), r"^boundary = 'published'.*5 of 695"),
    ):
        assert re.search(text, RadialAttention(**options).filled().advice(layout_of(size)))
    config = RadialAttention(boundary="published", block_size=16, sink=False, near="half").filled()
    assert config.density(layout_of((4, 1, 5))) == 0
    with pytest.raises(ConfigError, match=r"radial\.boundary = 'published'.*1 tiles of 20"):
        config.advice(layout_of((4, 1, 5)))


@pytest.mark.parametrize("options", [{}, {"order": "tiles"}, {"sink": True, "order": "tiles"}])
def test_the_lists_mean_what_the_order_says(options):
    """Attention by list and order equals masked attention in the sequence's own order."""
    layout = layout_of((6, 7, 11), (5, 8))
    q, k, v = torch.randn(3, 1, 2, layout.tokens, 8, dtype=torch.float64)
    options = {"block_size": 16, "decay_factor": 0.2, "near": "half", "sink": False, **options}
    config = RadialAttention(**options).filled()
    lists, order = config.tiles(layout), config.token_order(layout)
    out = block_sparse_attention(q, k, v, lists, token_order=order, layout="bhsd", backend="reference")
    place = order.argsort()
    mask = lists.states()[0].eq(EXACT)[place // 16][:, place // 16]
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


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
    grid=grids(1800),
    options=st.fixed_dictionaries({**settings_of_rule, "block_size": st.sampled_from([4, 8, 16, 32, 64, 128])}),
)
@settings(max_examples=50, deadline=None)
@example(grid=(66, 40), options=dict(block_size=16, decay_factor=0.5, near="half", sink=False))
@example(grid=(12, 257), options=dict(block_size=64, decay_factor=0.5, near="half", sink=False))
@example(grid=(3, 900), options=dict(block_size=128, decay_factor=0.5, near="half", sink=True))
def test_tiles_equal_the_token_level_procedure(grid, options):
    """As published, and exactly those with an allowed pair."""
    for boundary, brute in (("published", brute_published), ("any", brute_any)):
        r = rule(boundary=boundary, **options)
        np.testing.assert_array_equal(kept_tiles(r, grid[0], 1, grid[1]), brute(r, *grid))


WAN, HUNYUAN = True, False  # who has a sink


def test_published_counts_and_sparsities_to_the_digits_printed():
    for s, frames, decay, sink, near, kept, rows in (
        (3840, 18, 0.2, WAN, "half", 76_798, (78, 120, 106)),
        (3840, 18, 0.2, WAN, "full", 83_728, (92, 148, 120)),
        (256, 8, 1.0, WAN, "full", 232, None),
        (256, 8, 1.0, HUNYUAN, "full", 224, None),
    ):
        tiles = kept_tiles(rule(128, decay, near, sink), frames, 1, s)
        assert (len(tiles), tiles.sum()) == (frames * s / 128, kept)
        assert rows in (None, tuple(tiles[[0, len(tiles) // 2, -1]].sum(axis=1)))
    for s, frames, block_size, decay, sink, sparsity in (
        (3840, 18, 128, 0.2, WAN, "0.7129"), (3840, 18, 128, 0.5, WAN, "0.6611"), (3840, 18, 128, 1.0, WAN, "0.5691"),
        (3600, 21, 128, 0.2, WAN, "0.7378"), (3600, 21, 128, 1.0, WAN, "0.6035"), (1560, 21, 128, 0.2, WAN, "0.6613"),
        (1560, 21, 64, 0.2, WAN, "0.7319"), (1560, 21, 128, 1.0, WAN, "0.5551"), (3600, 41, 128, 1.0, WAN, "0.7401"),
        (3840, 30, 128, 0.95, HUNYUAN, "0.7254"), (3840, 30, 128, 0.95, WAN, "0.6992"),
    ):  # fmt: skip
        whole = frames * s // block_size
        tiles = kept_tiles(rule(block_size, decay, "full", sink), frames, 1, s)[:whole, :whole]
        assert f"{1 - tiles.mean():.4f}" == sparsity


def test_a_band_narrower_than_a_third_of_a_tile_is_no_published_tile():
    verdict = [bool(_meets_published(0, 19, 0, 19, reach, least)) for reach, least in ((1, 4), (1, 3), (2, 5), (2, 6))]
    assert verdict == [False, True, True, False]


@given(
    grid=st.tuples(st.integers(2, 16), st.integers(1, 24), st.integers(1, 24)),
    options=st.fixed_dictionaries({**settings_of_rule, "block_size": st.sampled_from([16, 64, 128])}),
    order=st.sampled_from(["raster", "tiles"]),
)
@settings(max_examples=40, deadline=None)
def test_every_token_sees_its_whole_frame(grid, options, order):
    frames, s = grid[0], grid[1] * grid[2]
    kept = kept_tiles(rule(boundary="any", order=order, **options), *grid)
    tile = (np.arange(frames * s) // options["block_size"]).reshape(frames, s)
    for own in tile:
        assert kept[np.ix_(own, own)].all()
    if options["sink"]:
        assert kept[:, tile[0]].all()
    else:
        np.testing.assert_array_equal(kept, kept.T)


def test_the_scale_is_the_smallest_power_of_two_strictly_above_the_frame_and_the_least_band_a_tile():
    for s, power in ((255, 256), (256, 512), (257, 512), (3600, 4096), (3840, 4096), (1560, 2048)):
        assert half_width(rule(block_size=16), 2, s) == power // 4
        assert half_width(rule(block_size=16), 8, s) == power // 16
    assert half_width(rule(decay_factor=0.01), 2, 3600) == half_width(rule(decay_factor=1e-9), 2, 3600) == 128


def test_far_frames_are_thinned_from_128_whatever_the_tile():
    for boundary, s, periods in (
        ("published", 3600, {1: 1, 16: 1, 31: 1, 32: 2, 63: 2, 64: 4, 127: 4}),
        ("published", 1560, {1: 1, 8: 1, 15: 1, 16: 2, 32: 4, 64: 8}),
        ("published", 64, {1: 2, 2: 4, 8: 16}),
        ("any", 64, {0: 1, 1: 1, 2: 2, 4: 4, 8: 8}),  # neighbours of small frames stay
        ("any", 3600, {1: 1, 16: 1, 32: 2, 64: 4}),
    ):
        for block_size in (64, 128):
            assert {d: frame_period(rule(block_size, boundary=boundary), d, s) for d in periods} == periods


def walk_of(rows, columns, strips):
    """Strips of nearly equal height, column by column up and down in turn, and strip by strip to and fro."""
    return [
        y * columns + x
        for number, strip in enumerate(np.array_split(np.arange(rows), strips))
        for x in range(columns)[:: -1 if number % 2 else 1]
        for y in strip[:: -1 if x % 2 else 1]
    ]


def spread(walk, columns, block_size):
    """The mean squared distance of a tile's tokens from their centre, over the tile starts that occur."""
    runs = np.lib.stride_tricks.sliding_window_view(np.divmod(walk, columns), block_size, axis=1)
    return runs[:, :: math.gcd(len(walk), block_size)].var(axis=2).sum(0).mean()


@pytest.mark.parametrize(
    ("rows", "columns", "block_size"),
    [(45, 80, 64), (45, 80, 128), (30, 52, 64), (30, 53, 128), (27, 48, 128), (12, 13, 16), (1, 40, 16)],
)
def test_the_walk_is_by_the_strips_of_the_most_compact_tiles(rows, columns, block_size):
    walks = [walk_of(rows, columns, strips) for strips in range(1, rows + 1)]
    best = min(walks, key=lambda walk: spread(walk, columns, block_size))
    assert patch_walk(rows, columns, block_size).tolist() == best
    y, x = np.divmod(best, columns)
    np.testing.assert_array_equal(patch_walk(columns, rows, block_size), x * rows + y)  # portrait


def test_a_frame_within_one_tile_keeps_its_raster_order():
    np.testing.assert_array_equal(patch_walk(8, 16, 128), np.arange(128))
    assert RadialAttention(order="tiles").filled().token_order(TokenLayout(frames=9, height=8, width=8)) is None


def brute_patches(r: RadialRule, frames: int, height: int, width: int) -> np.ndarray:
    """As many pairs of tiles in two frames as raster has; those of one place come first, then by their distance."""
    s, b = height * width, r.block_size
    side = -(-frames * s // b)
    out, places = np.zeros((side, side), bool), np.array(np.divmod(patch_walk(height, width, b), width))
    parts = [{tile: [] for tile in range(i * s // b, -(-(i + 1) * s // b))} for i in range(frames)]
    for token in range(frames * s):
        parts[token // s][token // b].append(token % s)
    for i, j in itertools.combinations_with_replacement(range(frames), 2):
        reach = reaches(r, frames, s)[j - i]
        pairs, met = [], 0
        for (row, mine), (column, theirs) in itertools.product(parts[i].items(), parts[j].items()):
            gap = max(mine[0], theirs[0]) - min(mine[-1], theirs[-1])
            met += gap <= reach
            apart = places[:, mine].sum(1) / len(mine) - places[:, theirs].sum(1) / len(theirs)
            pairs.append((gap > 0, (apart**2).sum(), len(pairs), row, column))
        for *_, row, column in sorted(pairs)[:met]:
            out[row, column] = out[column, row] = True
    if r.sink:
        out[:, list(parts[0])] = True
    return out


@given(
    grid=st.tuples(st.integers(2, 7), st.integers(1, 12), st.integers(1, 12)),
    options=st.fixed_dictionaries({**settings_of_rule, "block_size": st.sampled_from([4, 16, 32])}),
)
@settings(max_examples=25, deadline=None)
@example(grid=(4, 12, 20), options=dict(block_size=16, decay_factor=0.2, near="half", sink=False))
def test_patches_equal_the_nearest_pairs_of_every_two_frames(grid, options):
    r = rule(boundary="any", order="tiles", **options)
    np.testing.assert_array_equal(kept_tiles(r, *grid), brute_patches(r, *grid))


@given(
    grid=st.tuples(st.integers(2, 9), st.integers(1, 24), st.integers(1, 24)),
    text=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    order=st.sampled_from(["raster", "tiles"]),
)
@settings(max_examples=40, deadline=None)
def test_token_order_walks_each_frame_with_text_last(grid, text, order):
    (frames, height, width), before = grid, text[0]
    layout, s = layout_of(grid, text), height * width
    walk = patch_walk(height, width, 16) if order == "tiles" else np.arange(s)
    visual = (before + s * np.arange(frames)[:, None] + walk).ravel().tolist()
    expected = [*visual, *range(before), *range(before + frames * s, layout.tokens)]
    order = RadialAttention(order=order, block_size=16).filled().token_order(layout)
    assert expected == (list(range(layout.tokens)) if order is None else order.tolist())
