"""CFGCache on stock pipelines gives the rule that is written down here, also beside a cache."""

from unittest import mock

import pytest
import torch
from tiny_stock import run_stock, stock_pipeline

import dit_accel as d

NEGATIVE = dict(negative_prompt_embeds=torch.ones(1, 6, 16), negative_pooled_prompt_embeds=torch.ones(1, 8))
CASES = {
    "FluxPipeline": (dict(true_cfg_scale=2.0, **NEGATIVE), False),
    "ChromaPipeline": ({}, False),  # which opens no context
    "StableDiffusion3Pipeline": ({}, True),
}
"""Pipeline class -> what its call changes, and whether one forward holds both prompts, the negative one first."""

SETTINGS = {
    d.CFGCache(warmup_steps=2, max_consecutive=2): {2, 3, 5},
    d.CFGCache(warmup_steps=1, gate=3): {1, 3, 4, 5},
}
"""Settings -> the steps of six whose unconditional forward is left out."""


def rule(forward, left_out, together):
    """Wrap a forward: in some steps unc is cond - (the last computed cond - unc)."""
    calls, kept = iter(range(99)), {}

    def wrapped(*args, **inputs):
        out, (step, second) = forward(*args, **inputs), divmod(next(calls), 1 if together else 2)
        if not together and not second:
            kept["cond"] = out[0].clone()
            return out
        unc, cond = out[0].chunk(2) if together else (out[0], kept["cond"])
        kept["off"] = kept["off"] if step in left_out else cond - unc
        return (torch.cat([cond - kept["off"], cond]) if together else cond - kept["off"], *out[1:])

    return wrapped


@pytest.mark.parametrize("name", CASES)
def test_the_rule_and_beside_a_cache(name):
    (changes, together), (pipe, call) = CASES[name], stock_pipeline(name)
    run = lambda steps=6: run_stock(pipe, call, **{**changes, "num_inference_steps": steps})  # noqa: E731
    for config, left_out in SETTINGS.items():
        with mock.patch.object(pipe.transformer, "forward", rule(pipe.transformer.forward, left_out, together)):
            expected = run()
        with d.attach(pipe, config, preset="none"):
            torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
    cache = d.StaticCache(every=2, warmup_steps=2, last_steps=0)
    with d.attach(pipe, d.CFGCache(warmup_steps=2), cache) as attachment:
        run(10)
        log = attachment.report().section("cfgcache").data["forwards"]
        assert [one["step_index"] for one in log if (one["branch"], one["reused"]) == ("uncond", False)] == [0, 1, 5, 9]
        assert attachment.engine.recorder.forwards_run == 6 + 4  # a step that the cache skips counts for neither


def test_it_is_refused_where_there_is_nothing_to_leave_out():
    pipe, call = stock_pipeline("FluxPipeline")
    with d.attach(pipe, d.CFGCache(gate=4)), pytest.raises(d.ConfigError, match=r"gate = 4 .*run of 3 steps"):
        run_stock(pipe, call, **{**CASES["FluxPipeline"][0], "num_inference_steps": 3})
    with d.attach(pipe, d.CFGCache(), preset="none") as attachment:
        run_stock(pipe, call)
        assert "no forward was unconditional" in str(attachment.report())
        run_stock(pipe, call, **CASES["FluxPipeline"][0])
        assert "no forward was unconditional" not in str(attachment.report())
    pipe, call = stock_pipeline("Flux2Pipeline")
    with d.attach(pipe, d.CFGCache()), pytest.raises(d.ConfigError, match="Flux2Pipeline"):
        run_stock(pipe, call)
