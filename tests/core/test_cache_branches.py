"""Caches in loops written by hand that open no contexts: whose history a forward is forecast from."""

import pytest
import torch
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import StaticCache

STEPS, ENDS = 8, 4
"""Guidance ends at this step of so many."""
TEXTS = dict(zip(("cond", "uncond"), torch.randn(2, 1, 6, 64, generator=torch.Generator().manual_seed(1)), strict=True))


def outputs(model, order):
    """What each forward gives, by step and prompt, in a run whose guidance ends midway."""
    x = torch.randn(1, 12, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for step in range(STEPS):
        time = torch.tensor([1000.0 - 100 * step])
        with torch.no_grad():
            given = {
                name: model(x, time, 3 * TEXTS[name], return_dict=False)[0]
                for name in (order if step < ENDS else ("cond",))
            }
        found.append(given)
        x = x - 0.02 * sum(given.values()) / len(given)
    return found


@pytest.mark.parametrize("order", [("uncond", "cond"), ("cond", "uncond")], ids=["uncond first", "cond first"])
def test_a_branch_is_forecast_from_its_own_history_when_guidance_ends(order):
    model = tiny_transformer()
    cache = StaticCache(every=4, warmup_steps=2, last_steps=0, stored="output")
    with dit_accel.attach(model, cache) as attachment:
        given = outputs(model, order)
        forwards = attachment.report().section("staticcache").data["forwards"]
    for step, expected in ((2, 1), (3, 1), (4, 1), (6, 5), (7, 5)):  # what the last computed step gave is held
        assert torch.equal(given[step]["cond"], given[expected]["cond"]), step
    drawn = "".join("." if entry["reused"] else "#" for entry in forwards)
    assert drawn == "##" "##" ".." ".." "." "#" "." "."  # fmt: skip
