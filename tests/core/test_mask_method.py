"""Methods that are one fixed mask: which tiles that comes to, whole masks that stay dense, and what a plan counts."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from dit_accel_kernels import EXACT
from one_layer import ADAPTER, context_of, random_call

from dit_accel.methods import MaskHandler, Model, SparseConfig
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.plan.tiling import Tiling


@dataclass(frozen=True, slots=True, kw_only=True)
class Near(SparseConfig):
    name = "near"
    frames: int = 1
    space: int | None = None
    rest: Literal["skip", "pooled"] = "skip"


class NearHandler(MaskHandler):
    config_type = Near

    def mask(self, q, k, layout):
        seen = (q.frame - k.frame).abs() <= self.settings.frames
        if self.settings.space is not None:
            seen = seen & ((q.y - k.y).abs() + (q.x - k.x).abs() <= self.settings.space)
        return seen


def handler_of(config: Near, order: str = "raster") -> NearHandler:
    tiling = Tiling(config.block_size or 16, order)
    return NearHandler(config, Model(adapter=ADAPTER, family=None, heads=2, layers=3, tiling=tiling))


@pytest.mark.parametrize("order", ["raster", "tiles"])
@pytest.mark.parametrize("options", [dict(), dict(frames=0), dict(space=2), dict(frames=9, space=1), dict(frames=9)])
@pytest.mark.parametrize("text", [(0, 0), (5, 3)])
def test_a_tile_is_exact_where_any_of_its_pairs_is_seen(options, order, text):
    layout = TokenLayout(frames=5, height=6, width=7, text_before=text[0], text_after=text[1])
    handler = handler_of(Near(block_size=16, **options), order)
    walk = handler.model.tiling.token_order(layout)
    place = torch.arange(layout.visual_tokens) if walk is None else walk[: layout.visual_tokens] - text[0]
    at = [(t // 42, t % 42 // 7, t % 7) for t in place.tolist()]
    far = options.get("space", 10**6)
    seen = np.array(
        [
            [abs(f - g) <= options.get("frames", 1) and abs(y - b) + abs(x - a) <= far for g, b, a in at]
            for f, y, x in at
        ]
    )
    tiles = -(-len(at) // 16)
    seen = np.pad(seen, (0, tiles * 16 - len(at))).reshape(tiles, 16, tiles, 16).any((1, 3))
    assert np.array_equal(handler.kept(layout), seen)
    states = handler.plan(AttentionPlan(), random_call(layout), context_of(layout)).tiles.states()[0]
    whole = layout.visual_tokens // 16
    assert np.array_equal(states.eq(EXACT)[:whole, :whole].numpy(), seen[:whole, :whole])
    assert bool(states[whole:].eq(EXACT).all()) or not any(text)


def test_a_mask_that_leaves_nothing_out_stays_dense_and_says_so():
    layout = TokenLayout(frames=5, height=6, width=7)
    assert handler_of(Near(frames=1)).applies(layout)
    whole = handler_of(Near(frames=4))
    assert not whole.applies(layout)
    assert "near keeps all 196 tiles of 210 visual tokens" in whole.check_layout(layout)


def test_what_it_saves_is_known_before_it_runs():
    layout = TokenLayout(frames=5, height=6, width=7)
    handler = handler_of(Near(frames=1, dense_steps=2, dense_layers=1, rest="pooled"))
    saving = handler.estimate(layout, 4)
    kept = handler.kept(layout)
    assert saving.counted
    assert saving.tiles is not None
    assert saving.tiles.pools
    assert np.array_equal(saving.tiles.keep(np.ones_like(kept, dtype=float)), kept)
    assert [[saving.tiles.active(step, layer) for layer in range(2)] for step in range(4)] == [
        [False, False], [False, False], [False, True], [False, True],
    ]  # fmt: skip


def test_large_masks_are_not_held_as_a_whole():
    handler = handler_of(Near(frames=1, block_size=128))
    assert handler.kept(TokenLayout(frames=21, height=45, width=80)).shape == (591, 591)
