"""What an estimate says of tile lists and bitmaps, against those that a run makes."""

import dataclasses

import pytest
import torch
from one_layer import MODEL, OneLayer, random_call

from dit_accel import LVSA, LiteAttention, RadialAttention, SolAttention, SparseD
from dit_accel.methods.registry import handler_of
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.tiling import Tiling

ALWAYS = dict(block_size=16, dense_steps=0, dense_last_steps=0, dense_layers=0)
LAYOUTS = [
    TokenLayout(frames=11, height=6, width=10),  # 41.25 tiles
    TokenLayout(frames=11, height=6, width=10, text_before=5, text_after=30),
]
METHODS = {
    "lvsa": LVSA(trained_frames=5, window=1, **ALWAYS),
    "lvsa pooled": LVSA(trained_frames=5, window=1, rest="pooled", **ALWAYS),
    "lvsa still": LVSA(trained_frames=5, window=1, rotate=False, **ALWAYS),
    "lvsa, 2 dense steps": LVSA(trained_frames=5, window=1, **{**ALWAYS, "dense_steps": 2, "dense_last_steps": 1}),
    "radial": RadialAttention(decay_factor=0.2, near="half", **ALWAYS),
    "radial pooled": RadialAttention(decay_factor=0.2, near="half", rest="pooled", **ALWAYS),
    "radial, all": RadialAttention(decay_factor=9.0, rest="pooled", **ALWAYS),
    "sol": SolAttention(**ALWAYS),
    "sparsed": SparseD(density=0.3, **ALWAYS),
    "lite": LiteAttention(**{**ALWAYS, "dense_last_steps": None}),
    "lite, text too": LiteAttention(protect_text=False, **{**ALWAYS, "dense_last_steps": None}),
    "lite, kept": LiteAttention(protect_text=False, must_keep=(0, 64), **{**ALWAYS, "dense_last_steps": None}),
}


def tensors_of(value):
    return [x for name in value.__slots__ if isinstance(x := getattr(value, name), torch.Tensor)]


@pytest.mark.parametrize("name", METHODS)
def test_the_estimate_counts_every_entry_of_the_lists(name):
    config = METHODS[name]
    for layout, steps in zip(LAYOUTS, (2, 9), strict=True):
        seen = {}

        def note(planned, seen=seen):
            if planned.plan.tiles is None:  # a dense step
                return
            tensors = tensors_of(planned.plan.tiles)
            selection = planned.plan.selection
            if selection is not None and selection.pinned is not None:
                tensors.append(selection.pinned)
            seen.update((x.data_ptr(), x) for x in tensors)

        layer = OneLayer(config, steps=steps, backend="torch")
        layer.observe(note)
        call = random_call(layout, "bhsd", dtype=torch.float32)
        for step in range(steps):
            layer.call(call.q, call.k, call.v, layout, step=step)
        handler = handler_of(config)(config, dataclasses.replace(MODEL, tiling=Tiling(16)))
        assert handler.estimate(layout, steps).list_bytes == sum(x.nbytes for x in seen.values())
