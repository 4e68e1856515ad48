"""The RadialAttention config: its checks and recipes, tile lists with text, caching, counts, advice and warm-up."""

import re

import numpy as np
import pytest
import torch
from dit_accel_kernels import EXACT, POOLED, SKIPPED, block_sparse_attention
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.errors import ConfigError
from dit_accel.methods.attention import radial
from dit_accel.methods.attention.radial import RadialAttention
from dit_accel.plan.layout import TokenLayout

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
    assert RadialAttention(**resolved.to_dict()).filled() == resolved
    assert RadialAttention().filled().to_dict().items() >= dict(RadialAttention.defaults).items()


def test_a_false_or_zero_set_by_the_user_beats_the_recipe():
    resolved = RadialAttention(sink=False, dense_steps=0).filled({"sink": True, "dense_steps": 12})
    assert (resolved.sink, resolved.dense_steps) == (False, 0)


def test_a_wrong_recipe_and_one_frame_are_refused():
    for recipe, text in (
        ({"order": "tiles"}, r"recipe.*radial.*'order'.*block_size"),
        ({"decay": 0.5}, r"recipe.*radial.*'decay'.*'decay_factor'\?"),
        ({"decay_factor": -0.5}, r"radial\.decay_factor.*got -0\.5"),
    ):
        with pytest.raises(ConfigError, match=text):
            RadialAttention().filled(recipe)
    for call in ("tiles", "density", "kept", "advice"):
        with pytest.raises(ConfigError, match=r"radial.*2 latent frames, got 1 \(64 x 64 tokens\).*images"):
            getattr(RadialAttention().filled(), call)(TokenLayout(frames=1, height=64, width=64))


@given(
    grid=st.tuples(st.integers(2, 12), st.integers(1, 20), st.integers(1, 20)),
    text=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    block_size=st.sampled_from([16, 64]),
    options=st.fixed_dictionaries(
        {"rest": st.sampled_from(["skip", "pooled"]), "order": st.sampled_from(["raster", "tiles"])}
    ),
)
@settings(max_examples=80, deadline=None)
def test_text_is_exact_and_the_rest_is_as_asked(grid, text, block_size, options):
    frames, height, width = grid
    layout = TokenLayout(frames=frames, height=height, width=width, text_before=text[0], text_after=text[1])
    radial = RadialAttention(block_size=block_size, sink=False, decay_factor=0.2, near="half", **options).filled()
    lists = radial.tiles(layout).validate()
    states = lists.states()[0].numpy()
    assert (lists.num_q, lists.num_k, lists.block_q, lists.block_k) == (
        layout.tokens,
        layout.tokens,
        block_size,
        block_size,
    )
    np.testing.assert_array_equal(states, states.T)
    whole = layout.visual_tokens // block_size
    if sum(text):
        assert (states[whole:] == EXACT).all()
    else:
        assert counts(radial, layout) == (lists.tiles_exact, lists.tiles_total)
        assert radial.density(layout) == lists.density
    other = POOLED if options["rest"] == "pooled" else SKIPPED
    assert set(np.unique(states)) <= {EXACT, other}
    alone = TokenLayout(frames=frames, height=height, width=width)
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
    few = TokenLayout(frames=2, height=5, width=5)
    assert counts(RadialAttention(boundary="published").filled(), few) == (1, 1)


def test_lists_are_cached_by_what_decides_them():
    layout = TokenLayout(frames=5, height=12, width=20)
    first = RadialAttention(dense_steps=3).filled().tiles(layout)
    again = RadialAttention(dense_steps=7, sink=True).filled()
    assert again.tiles(TokenLayout(frames=5, height=12, width=20)) is first
    assert RadialAttention(sink=False).filled().tiles(layout) is not first
    assert RadialAttention(rest="pooled").filled().tiles(layout) is not first
    assert again.tiles(TokenLayout(frames=5, height=20, width=12)) is not first
    assert radial._tiles.cache_info().maxsize < 64
    order = RadialAttention(order="tiles").filled()
    assert order.token_order(layout) is order.token_order(layout)


def test_lists_made_in_inference_mode_serve_training():
    layout = TokenLayout(frames=3, height=9, width=31)
    config = RadialAttention(order="tiles", block_size=32).filled()
    with torch.inference_mode():
        lists, order = config.tiles(layout), config.token_order(layout)
    assert order is not None
    assert not any(tensor.is_inference() for tensor in (lists.exact_offsets, lists.exact_indices, order))


def test_advice_names_what_does_not_fit():
    assert RadialAttention().filled().advice(WAN_720P) is None
    mochi = {"boundary": "published", "block_size": 64, "sink": False}
    for options, (frames, height, width), text in (
        ({}, (2, 8, 8), r"radial.*1 tiles.*128 visual"),
        ({"block_size": 16}, (9, 16, 16), r"radial.*20000.*2304"),
        (mochi, (28, 30, 53), r"^boundary = 'published'.*5 of 695 block rows"),
    ):
        advice = RadialAttention(**options).filled().advice(TokenLayout(frames=frames, height=height, width=width))
        assert re.search(text, advice)


def test_a_mask_that_leaves_nothing_is_refused():
    """The original's rounding can drop every tile of a video within one."""
    radial = RadialAttention(boundary="published", block_size=16, sink=False, near="half").filled()
    layout = TokenLayout(frames=4, height=1, width=5)
    assert radial.density(layout) == 0
    with pytest.raises(
        ConfigError,
        match=r"radial\.boundary = 'published'.*1 tiles of 20",
    ):
        radial.advice(layout)


def test_dense_steps_and_layers():
    config = RadialAttention(dense_steps=2, dense_last_steps=1, dense_layers=1).filled()
    assert [config.is_dense(step, 6, 3) for step in range(6)] == [True, True, False, False, False, True]
    assert [config.is_dense(3, 6, layer) for layer in range(3)] == [True, False, False]
    assert not RadialAttention(dense_steps=0, dense_layers=0).filled().is_dense(0, None, 0)
    with pytest.raises(ConfigError, match=r"radial\.dense_last_steps = 1.*last_steps to 0"):
        config.is_dense(3, None, 3)


def test_the_lists_mean_what_the_order_says():
    """Attention by list and order equals masked attention in the sequence's own order."""
    layout = TokenLayout(frames=6, height=7, width=11, text_before=5, text_after=8)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, layout.tokens, 2, 8, dtype=torch.float64)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    for options in ({}, {"order": "tiles"}, {"sink": True, "order": "tiles"}):
        options = {"block_size": 16, "decay_factor": 0.2, "near": "half", "sink": False, **options}
        config = RadialAttention(**options).filled()
        lists, order = config.tiles(layout), config.token_order(layout)
        out = block_sparse_attention(q, k, v, lists, token_order=order, backend="reference")
        place = order.argsort()
        mask = lists.states()[0].eq(EXACT)[place // 16][:, place // 16]
        expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
        torch.testing.assert_close(out, expected)
