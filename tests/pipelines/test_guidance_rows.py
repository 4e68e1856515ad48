"""Methods of guidance in stock pipelines beside the matrix: guidance that ends, classes of others, refusals."""

import inspect

import diffusers
import pytest
import torch
from matrix_cases import plain_of
from matrix_runs import rows_call, run
from tiny_stock import PIPELINES, stock_pipeline

import dit_accel
from dit_accel import NAG, PAG, SLG, ConfigError
from dit_accel.adapters import installed

REFUSED = pytest.raises(ConfigError, match=r"folded.*guidance")
BRANCHES = {"pag": PAG(layers="L1", scale=2.0), "slg": SLG(layers="L1", scale=2.0, start=0.0, stop=1.0)}
FREE = PAG(layers="L1", mode="free")


def far(one, other):
    return float((one - other).abs().max())


def rows(name, pipe, call, *prompts):
    """The latents of some prompts, all from one seed."""
    return run(pipe, rows_call(PIPELINES[name], call, prompts), (0,) * len(prompts))


FREELY = ("FluxPipeline", "WanPipeline", "CogVideoXPipeline", "Lumina2Pipeline")
"""Pipelines guided in two calls and in one, by scales of other meanings, with a rescaled prediction."""


def require_rows_alone(name, pipe, call):
    """Require that two prompts are what they are alone, and return the latents of the first."""
    both = rows(name, pipe, call, 0, 1)
    alone = torch.cat([rows(name, pipe, call, prompt) for prompt in (0, 1)])
    assert far(both, alone) <= 2e-5 * float(alone.abs().max())
    return alone[:1]


@pytest.mark.parametrize("name", FREELY)
def test_two_prompts_are_guided_freely_as_alone(name):
    plain = plain_of(name)
    pipe, call = plain.pipe, plain.call
    if name == "FluxPipeline":
        negative = {f"negative_{key}": torch.ones_like(call[key]) for key in ("prompt_embeds", "pooled_prompt_embeds")}
        call = {**call, "true_cfg_scale": 2.0, **negative}
    before = rows(name, pipe, call, 0)
    with dit_accel.attach(pipe, FREE):
        alone = require_rows_alone(name, pipe, call)
    assert far(alone, before) > 1e-4 * float(alone.abs().max())


def ends_guidance(pipe, step, timestep, held):
    """diffusers' own way to guide the first steps alone."""
    if step == 1:
        half = len(held["prompt_embeds"]) // 2
        held.update({key: value[half:] for key, value in held.items() if key != "latents"})
        pipe._guidance_scale = 0.0
    return held


@pytest.mark.parametrize("method", [BRANCHES["pag"], BRANCHES["slg"], FREE], ids=lambda one: f"{one.name} {one.mode}")
def test_guidance_in_one_call_that_ends_midway_guides_the_right_rows(method):
    name = "StableDiffusion3Pipeline"
    pipe, call = stock_pipeline(name)
    held = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    call.update(num_inference_steps=4, callback_on_step_end=ends_guidance, callback_on_step_end_tensor_inputs=held)
    plain = rows(name, pipe, call, 0)
    with dit_accel.attach(pipe, method) as attachment:
        alone = require_rows_alone(name, pipe, call)
        steps = attachment.report().section(method.name).data["steps"]
    assert far(alone, plain) > 1e-2
    assert steps == ([0, 1] if method.mode == "free" else [0, 1, 2, 3])


@pytest.mark.parametrize(("method", "guided"), [(BRANCHES["pag"], 6), (FREE, 4)], ids=["branch", "free"])
def test_guidance_in_one_call_that_a_pipeline_truncates_guides_the_right_rows(method, guided):
    """Z-Image goes on saying that it guides while its forwards hold the conditional prompt alone."""
    pipe, call = stock_pipeline("ZImagePipeline")
    with dit_accel.attach(pipe, method) as attachment:
        require_rows_alone("ZImagePipeline", pipe, {**call, "num_inference_steps": 6, "cfg_truncation": 0.5})
        assert attachment.report().section("pag").data["steps"] == list(range(guided))


def test_a_pipeline_of_another_class_that_tells_nothing_is_refused_by_name():
    class Own(diffusers.FluxKontextPipeline):
        def __call__(self, prompt_embeds, pooled_prompt_embeds, **_):
            self.transformer(
                hidden_states=torch.randn(2, 80, 4), timestep=torch.ones(2), guidance=torch.ones(2),
                pooled_projections=pooled_prompt_embeds.expand(2, -1), txt_ids=torch.zeros(6, 3),
                encoder_hidden_states=prompt_embeds.expand(2, -1, -1), img_ids=torch.zeros(80, 3),
            )  # fmt: skip

    class Same(diffusers.FluxKontextPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    pipe, call = stock_pipeline("FluxKontextPipeline")
    other, same = Own(**pipe.components), Same(**pipe.components)
    same.set_progress_bar_config(disable=True)
    for method in (PAG(layers="L1"), NAG(negative_embeds=torch.ones(1, 6, 16))):
        told = rf"{method.name}.*which prompt.*Own.*transformer\.cache_context\(name\) .*adapter 'flux'"
        with dit_accel.attach(other, method), torch.no_grad(), pytest.raises(ConfigError, match=told):
            other(**call)
        with dit_accel.attach(same, method):
            assert rows("FluxKontextPipeline", same, call, 0).isfinite().all()


def test_a_subclass_that_hands_its_call_on_rescales_as_the_class_does():
    pipe, call = stock_pipeline("QwenImageEditPipeline")
    assert type(pipe).__name__ == "Small"
    refused = pytest.raises(ConfigError, match=r"pag.*rescales.*norm")
    with dit_accel.attach(pipe, PAG(layers="L1")), refused:
        rows("QwenImageEditPipeline", pipe, call, 0)


def test_pipelines_with_perturbed_attention_of_their_own_are_refused():
    pipe, call = stock_pipeline("StableDiffusion3Pipeline")
    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    other = diffusers.StableDiffusion3PAGPipeline(**parts, pag_applied_layers="blocks.1$")
    other.set_progress_bar_config(disable=True)
    refused = pytest.raises(ConfigError, match=r"pag.*StableDiffusion3PAGPipeline.*perturbed attention")
    with dit_accel.attach(other.transformer, PAG(layers="L1")), refused:
        rows("StableDiffusion3Pipeline", other, {**call, "pag_scale": 0.0}, 0)


def test_beside_a_pipeline_s_own_skipped_layers_all_predictions_get_the_same():
    """SD3 runs the conditional prompt again without some layers: a third prediction, to which the same is added."""
    pipe, call = stock_pipeline("StableDiffusion3Pipeline")
    call = {**call, "num_inference_steps": 1, "skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0,
            "skip_layer_guidance_start": -1.0}  # fmt: skip

    def added(scale, method):
        changed = {**call, "guidance_scale": scale}
        plain = rows("StableDiffusion3Pipeline", pipe, changed, 0)
        with dit_accel.attach(pipe, method) as attachment:
            made = rows("StableDiffusion3Pipeline", pipe, changed, 0)
            return made - plain, attachment.report().section(method.name).data

    once, data = added(2.0, BRANCHES["pag"])
    assert data["forwards_added"] == 1
    assert float((once - added(4.0, BRANCHES["pag"])[0]).norm() / once.norm()) < 2e-3
    assert added(2.0, FREE)[1]["branches"] == ["call 0"]
    embeds = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(3))
    assert added(2.0, NAG(negative_embeds=embeds))[1]["branches"] == ["call 0", "call 1"]


def test_a_rescaling_that_only_an_argument_asks_for_is_seen():
    guidance = installed.adapters()["flux-kin"].guidance
    assert "normalize" in inspect.signature(diffusers.BriaPipeline.__call__).parameters
    for value, why in ((True, "normalize = True scales the guided prediction by the conditional one"), (False, None)):
        call = dit_accel.adapters.guidance.PipelineCall(None, ("BriaPipeline",), {"normalize": value})
        assert guidance.why_not_folded(call) == why


def test_what_counts_is_the_pipeline_that_runs():
    """Not the one that methods were attached to: it may be none, or another that shares the transformer."""
    pipe, call = stock_pipeline("QwenImagePipeline")
    with dit_accel.attach(pipe.transformer, BRANCHES["pag"]), REFUSED:
        rows("QwenImagePipeline", pipe, call, 0)
    text, call = stock_pipeline("StableDiffusion3Pipeline")
    image, others = stock_pipeline("StableDiffusion3Img2ImgPipeline")
    image = diffusers.StableDiffusion3Img2ImgPipeline(**text.components)
    image.set_progress_bar_config(disable=True)
    made = []
    for owner in (image, text, text.transformer):
        text._guidance_scale = 1.0  # stale: this one does not run
        with dit_accel.attach(owner, BRANCHES["pag"]):
            made.append(rows("StableDiffusion3Img2ImgPipeline", image, others, 0, 1))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
