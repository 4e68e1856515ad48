"""ProgressiveResolution: what a model predicts that knows the clean latents at both sizes; what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import MODELS

from dit_accel import PAG, ConfigError, ProgressiveResolution, UltraImage, attach
from dit_accel.adapters import installed
from dit_accel.estimate.prediction import estimate
from dit_accel.methods.base import Model
from dit_accel.methods.caches.progressive import doubled, halved, packed, unpacked
from dit_accel.methods.compose import make_handlers
from dit_accel.plan.layout import layout_of
from dit_accel.testing.tiny_models import Case

SIGMAS = (0.95, 0.7, 0.4, 0.2)
KNOWN = {"wan": 1000.0, "flux": 1.0, "qwen-image": 1.0, "sd3": 1000.0}
"""Family -> what a pipeline hands its transformer as the timestep of noise level 1."""


def velocities(name, crop=None, bias=0.0, flat=True, **options):
    """Run a model that knows all, biased where it is small: what came out, what is right, levels and sizes of runs."""
    case = Case(installed.adapters()[name], MODELS[name][0])
    inputs = case.inputs(1)
    like = inputs["hidden_states"] = inputs["hidden_states"][..., :crop, :]
    layout = layout_of(case.adapter.grid(case.transformer.config, inputs))
    half = replace(layout, height=math.ceil(layout.height / 2), width=math.ceil(layout.width / 2))
    noise, clean = (unpacked(torch.randn_like(like), layout) for _ in range(2))
    clean = doubled(halved(clean)) if flat else clean
    sizes = []

    def forward(hidden_states, timestep, img_ids=None, img_shapes=None, **others):
        sigma = float(timestep.flatten()[0]) / KNOWN[name]
        size = layout if hidden_states.shape == like.shape else half
        x, e, x0 = unpacked(hidden_states, size).clone(), noise, clean
        if size is half:
            e, x0 = 2 * halved(noise), halved(clean) + bias
            assert img_ids is None or img_ids[:, 1:3].amax(0).tolist() == [size.height - 1, size.width - 1]
            assert img_shapes in (None, [[size.grid[:3]]])
            torch.testing.assert_close(x[..., : e.shape[-2], :], (1 - sigma) * (x0 - bias) + sigma * e)
        sizes.append((sigma, size.height))
        x[..., : x0.shape[-2], :] -= x0
        return (packed(x / sigma, like=hidden_states),)

    case.transformer.forward = forward
    out = []
    with attach(case.transformer, ProgressiveResolution(**options), preset="none"), torch.no_grad():
        for index, sigma in enumerate(SIGMAS):
            x = packed((1 - sigma) * clean + sigma * noise, like=like)
            context = dict(step_index=index, num_inference_steps=len(SIGMAS), sigma=sigma)
            with case.transformer.cache_context("cond", **context):
                given = {**inputs, "hidden_states": x, "timestep": torch.full((1,), sigma * KNOWN[name])}
                out.append(unpacked(case.transformer(**given, return_dict=False)[0], layout))
    return out, noise - clean, sizes


@pytest.mark.parametrize(("name", "crop"), [*((name, None) for name in KNOWN), ("wan", -2)])
def test_what_a_small_step_gives_is_the_velocity_of_the_full_size(name, crop):
    out, right, sizes = velocities(name, crop, until=0.5)
    for v in out:
        torch.testing.assert_close(v, right, rtol=1e-4, atol=1e-4)
    levels, (small, *_, full) = zip(*sizes, strict=True)
    assert [round(sigma, 3) for sigma in levels] == [0.905, 0.538, 0.4, 0.2]  # sigma / (2 - sigma), then sigma
    assert small == math.ceil(full / 2)  # rows, padded where they are odd


@pytest.mark.parametrize("tau", [True, False])
def test_between_full_steps_high_frequencies_stay_and_tau_takes_off_what_the_small_size_is_off_by(tau):
    out, right, sizes = velocities("wan", bias=0.5, flat=False, until=1.0, every=2, last_steps=0, tau=tau)
    assert len(sizes) == (6 if tau else 4)
    for index, (v, sigma) in enumerate(zip(out, SIGMAS, strict=True)):
        off = 0.0 if tau or index % 2 == 0 else 0.5
        torch.testing.assert_close(v, right - off / sigma, rtol=1e-4, atol=1e-4)


def test_a_plan_counts_small_forwards_by_their_size():
    adapter = installed.adapters()["flux"]
    family = next(family for family in adapter.families if family.name == "flux.1-dev")
    many = [estimate(adapter, family, methods=[ProgressiveResolution(until=u, last_steps=0)]).speedup for u in (1, 0.5)]
    assert many[0] == 1
    assert 1.5 < many[1] < 1 / (0.5 + 0.5 / 4)  # half of the steps, of a quarter of the picture's tokens


GUIDED = UltraImage(guided=True, trained_height=4, trained_width=4, correct=False)


@pytest.mark.parametrize(("options", "beside", "words"), [
    ({}, (), r"36.*16"), ({"every": 2}, (PAG(layers="L1"),), r"pag.*every = 2"), ({}, (GUIDED,), r"ultraimage"),
])  # fmt: skip
def test_what_cannot_be_pooled_or_followed_is_refused(options, beside, words):
    channels = {} if beside else {"in_channels": 36, "out_channels": 16}
    model = Model(adapter=installed.adapters()["flux"], family=None, heads=2, layers=2, config=channels)
    with pytest.raises(ConfigError, match=words):
        make_handlers([ProgressiveResolution(**options), *beside], model)


def test_reference_tokens_are_refused():
    case = Case(installed.adapters()["qwen-image"], MODELS["qwen-image"][-1])
    refused = pytest.raises(ConfigError, match=r"reference.*hidden_states")
    with attach(case.transformer, ProgressiveResolution(until=0.0), preset="none"), refused:
        case.run(case.inputs(1))
