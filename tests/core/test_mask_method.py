"""Methods that are one fixed mask: which tiles that comes to, whole masks that stay dense, and what a plan counts."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
from dit_accel_kernels import EXACT
from one_layer import ADAPTER, context_of, layout_of, random_call

from dit_accel.methods import MaskHandler, Model, SparseConfig
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
    layout = layout_of((5, 6, 7), text)
    handler = handler_of(Near(block_size=16, **options), order)
    walk = handler.model.tiling.token_order(layout)
    place = np.arange(210) if walk is None else walk[:210].numpy() - text[0]
    frame, y, x = np.unravel_index(place, (5, 6, 7))
    apart = [np.abs(np.subtract.outer(axis, axis)) for axis in (frame, y, x)]
    seen = (apart[0] <= options.get("frames", 1)) & (apart[1] + apart[2] <= options.get("space", 99))
    seen = np.pad(seen, (0, 14)).reshape(14, 16, 14, 16).any((1, 3))
    assert np.array_equal(handler.kept(layout), seen)
    states = handler.plan(AttentionPlan(), random_call(layout), context_of(layout)).tiles.states()[0]
    assert np.array_equal(states.eq(EXACT)[:13, :13].numpy(), seen[:13, :13])
    assert bool(states[13:].eq(EXACT).all()) or not any(text)


def test_a_mask_that_leaves_nothing_out_stays_dense_and_says_so():
    layout, whole = layout_of((5, 6, 7)), handler_of(Near(frames=4))
    assert handler_of(Near(frames=1)).applies(layout)
    assert not whole.applies(layout)
    assert "near keeps all 196 tiles of 210" in whole.check_layout(layout)


def test_what_it_saves_is_known_before_it_runs():
    layout, handler = layout_of((5, 6, 7)), handler_of(Near(frames=1, dense_steps=2, dense_layers=1, rest="pooled"))
    saving, kept = handler.estimate(layout, 4), handler.kept(layout)
    assert (saving.counted, saving.tiles.pools) == (True, True)
    assert np.array_equal(saving.tiles.keep(np.full((3, 14), 0.7), slice(2, 5)), 0.7 * kept[2:5])
    active = [(step, layer) for step in range(4) for layer in range(2) if saving.tiles.active(step, layer)]
    assert active == [(2, 1), (3, 1)]
