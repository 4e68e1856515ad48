"""Foreground-only attention decides row by row: prompts that share a call get what each of them gets alone."""

import diffusers
import pytest
import tiny_pipelines
import tiny_video_pipelines
import torch
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel.methods.attention.dfa import DFA


def wan():
    vae, scheduler = tiny_video_pipelines._wan_vae(12), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = dict(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler)
    pipe = diffusers.WanPipeline(transformer=tiny_transformer(), **parts)
    prompt = tiny_video_pipelines._prompts(width=64)
    return pipe, dict(height=64, width=64, num_frames=9, guidance_scale=3.0, **prompt)


MAKERS = {
    "wan": wan,  # one call a prompt
    "hunyuan-video": tiny_pipelines.hunyuan_video,
    "ltx": tiny_pipelines.ltx,  # both prompts of guidance in one call
    "mochi": tiny_pipelines.mochi,  # attention row by row
}


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
    [*((name, config, 3.0) for name in MAKERS for config in (OTSU, STRICT)), ("ltx", OTSU, 1.0), ("mochi", OTSU, 1.0)],
)
def test_two_prompts_in_a_batch_get_what_each_gets_alone(name, config, guidance):
    pipe, call = MAKERS[name]()
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
