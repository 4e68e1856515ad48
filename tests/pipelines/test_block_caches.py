"""DBCache and FirstBlockCache on every family: what runs, what stays, and what a model adds between its blocks."""

from dataclasses import replace

import pytest
import torch
from tiny_models import MODELS

import dit_accel
from dit_accel import DBCache, FirstBlockCache
from dit_accel.adapters import registry
from dit_accel.attachment.site import find_blocks
from dit_accel.testing.tiny_models import Case

FOREVER = dict(threshold=1e9, warmup_steps=0, last_steps=0)


def cases(name):
    return [Case(registry.adapters()[name], model) for model in MODELS[name]]


def frozen(case, steps):
    """The outputs of some steps on the same inputs, which nothing but the step's number tells apart."""
    inputs = case.inputs()
    out = []
    for step in range(steps):
        with torch.no_grad(), case.transformer.cache_context("cond", step_index=step, num_inference_steps=8):
            given = case.transformer(**inputs, return_dict=False)
        out.append(given)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_every_family(name):
    for case in cases(name):
        blocks = find_blocks(case.adapter, case.transformer)
        last = 1 if len(blocks) > 2 else 0
        ran = []
        for block in blocks:
            block.module.register_forward_hook(lambda *_, index=block.index: ran.append(index))
        inputs = case.inputs()
        plain = [case.run(inputs, step) for step in range(3)]
        ran.clear()
        with dit_accel.attach(case.transformer, FirstBlockCache(threshold=0.0, warmup_steps=0, last_steps=0)):
            for step in range(3):
                assert torch.equal(case.run(inputs, step), plain[step])
        assert ran == [*range(len(blocks))] * 3
        ran.clear()
        with dit_accel.attach(case.transformer, DBCache(first_blocks=1, last_blocks=last, **FOREVER)) as attachment:
            given = [case.run(inputs, step) for step in range(3)]
            entries = attachment.report().section("dbcache").data["forwards"]
        always = [0, *range(len(blocks) - last, len(blocks))]
        assert [entry["reused"] for entry in entries] == [False, True, True], entries
        assert ran == [*range(len(blocks)), *always, *always]
        assert torch.equal(given[0], plain[0])
        if all(torch.equal(one, plain[0]) for one in plain):  # its timestep alone told the steps apart
            for out in given[1:]:
                torch.testing.assert_close(out, plain[0], rtol=1e-3, atol=1e-4)
        assert torch.equal(case.run(inputs), plain[0])
