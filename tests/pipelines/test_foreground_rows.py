"""Foreground-only attention decides row by row: prompts that share a call get what each of them gets alone."""

import pytest
import torch
from tiny_stock import stock_pipeline

import dit_accel
from dit_accel.methods.attention.dfa import DFA

NAMES = (
    "WanPipeline",  # one call a prompt
    "HunyuanVideoPipeline",
    "LTXPipeline",  # both prompts of guidance in one call
    "MochiPipeline",  # attention row by row
)


def of_prompts(call, *seeds):
    """A call's arguments for some prompts, made up of seeds."""
    changed = {}
    for name, value in call.items():
        if isinstance(value, torch.Tensor) and ("prompt" in name):
            rows = [value] * len(seeds)
            if "embeds" in name and not name.startswith("negative"):
                rows = [torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            changed[name] = torch.cat(rows)
    return {**call, **changed, "num_inference_steps": 5, "output_type": "latent"}


def run(pipe, call, prompts, noises):
    generators = [torch.Generator().manual_seed(seed) for seed in noises]
    torch.manual_seed(0)
    return pipe(**of_prompts(call, *prompts), generator=generators).frames


OTSU, STRICT = DFA(warmup_steps=1), DFA(share=0.4, warmup_steps=1, strict=True)


@pytest.mark.parametrize(
    ("name", "config", "guidance"),
    [
        *((name, config, 3.0) for name in NAMES for config in (OTSU, STRICT)),
        ("LTXPipeline", OTSU, 1.0),
        ("MochiPipeline", OTSU, 1.0),
    ],
)
def test_two_prompts_in_a_batch_get_what_each_gets_alone(name, config, guidance):
    pipe, call = stock_pipeline(name)
    call["guidance_scale"] = guidance
    pipe.set_progress_bar_config(disable=True)
    plain = run(pipe, call, [1, 2], [3, 4])
    with dit_accel.attach(pipe, config):
        alone = torch.cat([run(pipe, call, [1], [3]), run(pipe, call, [2], [4])])
        both = run(pipe, call, [1, 2], [3, 4])
    torch.testing.assert_close(run(pipe, call, [1, 2], [3, 4]), plain, rtol=0, atol=0)
    effect = (alone - plain).abs().amax(dim=tuple(range(1, plain.ndim)))
    off = (both - alone).abs().amax(dim=tuple(range(1, plain.ndim)))
    assert (effect > 1e-4).all()
    assert (off < 1e-2 * effect).all(), (off, effect)
