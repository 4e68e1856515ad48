"""Methods of guidance in stock pipelines: each row of a call as alone, and what is added the same at any scale."""

import copy
import inspect

import diffusers
import pytest
import torch
from prompt_rows import ONE_PROMPT, PIPELINES, run
from some_cases import some

import dit_accel
from dit_accel import NAG, PAG, SEG, SLG, AutoGuidance, ConfigError, SoftPAG
from dit_accel.adapters import installed

TWO = [name for name in PIPELINES if name not in ONE_PROMPT]
QUICK = (
    "flux-kontext", "flux-kontext, two calls", "flux-fill", "wan-v2v", "chroma", "sd3", "sd3, guidance off", "z-image",
    "hidream", "ideogram4", "cogvideox",
)  # fmt: skip
RESCALING = {
    "qwen-image", "qwen-image-edit", "qwen-image-edit-plus", "qwen-image-layered", "qwen-image-controlnet", "lumina2",
    "nucleus-image", "joyimage-edit", "joyimage-edit-plus",
}  # fmt: skip
"""Pipelines that scale the guided prediction by the conditional one, so that nothing can be folded into both."""
REFUSED = pytest.raises(ConfigError, match=r"folded.*guidance")
BRANCHES = {
    "pag": PAG(layers="L1", scale=2.0),
    "seg": SEG(layers="L1", scale=8.0),  # its branch differs little: a larger scale stands out of the rounding
    "slg": SLG(layers="L1", scale=2.0, start=0.0, stop=1.0),
}
FREE = PAG(layers="L1", mode="free")


def branches(pipe):
    """Return a method of each kind of third branch, of which one runs a weaker copy of the pipeline's model.

    SEG runs in our kernels, which can't follow the numbers that Chroma's image to image passes as a text mask.
    """
    weak = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        for parameter in weak.parameters():
            parameter.mul_(0.9)
    masked = type(pipe).__name__ == "ChromaImg2ImgPipeline"
    kinds = [method for name, method in BRANCHES.items() if not (masked and name == "seg")]
    return [*kinds, AutoGuidance(scale=2.0, weak_transformer=weak)]


def far(one, other):
    return float((one - other).abs().max())


def require_rows_as_alone(name, methods):
    """Two prompts from one seed give each what it gets alone, to the rounding of the pipeline with nothing attached.

    ``methods``: what is attached in turn; None: what `branches` gives.
    """
    pipe, call = PIPELINES[name]()
    plain = [run(name, pipe, call, rows, seeds) for rows, seeds in (((0, 1), (0, 0)), ((0,), (0,)), ((1,), (0,)))]
    scale = float(plain[1].abs().max())
    rounding = max(10 * far(plain[0], torch.cat(plain[1:])), 2e-6 * scale)
    assert rounding < 1e-2 * scale
    tried = 0
    for method in branches(pipe) if methods is None else methods:
        with dit_accel.attach(pipe, method):
            if name in RESCALING and getattr(method, "mode", None) == "branch":
                with REFUSED:
                    run(name, pipe, call, (0, 1), (0, 0))
                continue
            both = run(name, pipe, call, (0, 1), (0, 0))
            alone = torch.cat([run(name, pipe, call, (row,), (0,)) for row in (0, 1)])
        assert far(both, alone) <= rounding, f"{method}: {far(both, alone):.2g} off, {rounding:.2g} is rounding"
        moved = far(alone, torch.cat(plain[1:]))
        tried += moved > 5 * rounding
    return tried


@pytest.mark.parametrize("name", some(TWO, *QUICK))
def test_two_prompts_of_one_seed_are_as_alone(name):
    assert require_rows_as_alone(name, None) + require_rows_as_alone(name, [FREE]) >= 1


NAG_TEXTS = {"flux": 6, "flux-img2img": 6, "flux-kontext": 6, "flux-fill": 6, "flux2": 6, "wan-v2v": 6, "sd3": 6,
             "sd3, guidance off": 6, "hunyuan-video": 6, "qwen-image": 6, "cogvideox": 6, "skyreels-v2": 6}  # fmt: skip


@pytest.mark.parametrize("name", some(NAG_TEXTS, "flux-kontext", "wan-v2v", "sd3"))
def test_two_prompts_of_one_seed_are_led_as_alone(name):
    width = 64 if name in ("wan-v2v", "skyreels-v2") else 16
    embeds = torch.randn(1, NAG_TEXTS[name], width, generator=torch.Generator().manual_seed(3))
    assert require_rows_as_alone(name, [NAG(scale=4.0, alpha=0.5, negative_embeds=embeds)]) == 1


def adapter_of(pipe):
    return installed.adapter_for(type(pipe.transformer).__name__)


def scale_of(pipe, call):
    """The argument that guides by a negative prompt; None: the scale is an input of the model."""
    taken = inspect.signature(type(pipe).__call__).parameters
    if "true_cfg_scale" in taken:
        return "true_cfg_scale" if {"negative_prompt_embeds", "true_cfg_scale"} & set(call) else None
    embedded = adapter_of(pipe).guidance.embedded
    is_input = embedded is not None and pipe.transformer.config.get(embedded)
    return "guidance_scale" if "guidance_scale" in taken and not is_input else None


NOT_LINEAR = ("flux3", "minimax-h3", "mochi", "anyflow", "allegro", "pixart", "hunyuan-dit")
"""Pipelines that take no scale, no single step or no negative prompt; the last three clip the clean prediction."""
LINEAR = [name for name in PIPELINES if not name.startswith(NOT_LINEAR)]


@pytest.mark.parametrize("name", some(LINEAR, "wan-v2v", "chroma", "sd3", "hidream", "ideogram4"))
def test_what_is_added_does_not_depend_on_the_guidance_scale(name):
    """In one Euler step, guided by 1 or 3: cond + w (cond - perturbed) is in both besides the negative prompt."""
    pipe, call = PIPELINES[name]()
    argument = scale_of(pipe, call)
    if argument is None:
        pytest.skip("its scale is an input of the model")
    call = {**call, "num_inference_steps": 1, **({"strength": 1.0} if "strength" in call else {})}

    def added(scale, method):
        changed = {**call, argument: scale}
        plain = run(name, pipe, changed, (0,), (0,))
        with dit_accel.attach(pipe, method):
            return run(name, pipe, changed, (0,), (0,)) - plain

    off = 0.0 if adapter_of(pipe).name in ("z-image", "krea2") else 1.0
    for method in branches(pipe):
        if name in RESCALING:
            with REFUSED:
                added(3.0, method)
            continue
        once, guided = added(off, method), added(3.0, method)
        assert float(once.norm()) > 0
        assert float((once - guided).norm() / once.norm()) < 2e-3


def ends_guidance(pipe, step, timestep, held):
    """diffusers' own way to guide the first steps alone."""
    if step == 1:
        half = len(held["prompt_embeds"]) // 2
        held.update({key: value[half:] for key, value in held.items() if key != "latents"})
        pipe._guidance_scale = 0.0
    return held


@pytest.mark.parametrize("method", [*BRANCHES.values(), FREE], ids=lambda one: f"{one.name} {one.mode}")
def test_guidance_in_one_call_that_ends_midway_guides_the_right_rows(method):
    pipe, call = PIPELINES["sd3"]()
    held = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    call.update(
        num_inference_steps=5,
        callback_on_step_end=ends_guidance,
        callback_on_step_end_tensor_inputs=held,
    )
    plain = run("sd3", pipe, call, (0,), (0,))
    with dit_accel.attach(pipe, method) as attachment:
        both = run("sd3", pipe, call, (0, 1), (0, 0))
        section = attachment.report().section(method.name)
        alone = torch.cat([run("sd3", pipe, call, (row,), (0,)) for row in (0, 1)])
    assert far(both, alone) <= 2e-5 * float(alone.abs().max())
    assert far(alone[:1], plain) > 1e-2
    assert section.data["steps"] == ([0, 1] if method.mode == "free" else [0, 1, 2, 3, 4])


def test_guidance_in_one_call_that_a_pipeline_truncates_guides_the_right_rows():
    """Z-Image goes on saying that it guides while its forwards hold the conditional prompt alone."""
    pipe, call = PIPELINES["z-image"]()
    call = {**call, "num_inference_steps": 6, "cfg_truncation": 0.5}
    for method in (BRANCHES["pag"], FREE):
        with dit_accel.attach(pipe, method) as attachment:
            both = run("z-image", pipe, call, (0, 1), (0, 0))
            steps = attachment.report().section("pag").data["steps"]
            alone = torch.cat([run("z-image", pipe, call, (row,), (0,)) for row in (0, 1)])
        assert far(both, alone) <= 2e-5 * float(alone.abs().max())
        assert steps == list(range(4 if method is FREE else 6))


@pytest.mark.parametrize("name", ["flux", "flux-kontext", "hidream"])
@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)], ids=["one seed", "two seeds"])
def test_two_images_of_one_prompt_are_as_alone(name, seeds):
    pipe, call = PIPELINES[name]()
    with dit_accel.attach(pipe, BRANCHES["pag"]):
        torch.manual_seed(0)
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        both = pipe(**{**call, "num_images_per_prompt": 2, "generator": noise, "output_type": "latent"}).images
        alone = torch.cat([run(name, pipe, call, (0,), (seed,)) for seed in seeds])
    assert far(both, alone) <= 2e-5 * float(alone.abs().max())


@pytest.mark.parametrize("name", ["flux", "flux-kontext", "flux-img2img"])
def test_one_row_of_text_is_led_in_all_images_it_serves(name):
    """FLUX broadcasts one prompt's embeddings over the images that are made of it."""
    pipe, call = PIPELINES[name]()
    call = {**call, "output_type": "latent"}
    embeds = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(3))

    def made(*methods):
        noise = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        with dit_accel.attach(pipe, *methods, preset="none"):
            both = pipe(**call, num_images_per_prompt=2, generator=noise).images
            return both, torch.cat([run(name, pipe, call, (0,), (seed,)) for seed in (0, 1)])

    plain, _ = made()
    both, alone = made(NAG(negative_embeds=embeds, scale=4.0, alpha=0.5))
    rows = slice(0, 1) if name == "flux-img2img" else slice(0, 2)  # its second picture is encoded with other noise
    assert far(both[rows], alone[rows]) <= 2e-5 * float(alone.abs().max())
    assert far(both, plain) > 1e-2


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

    pipe, call = PIPELINES["flux-kontext"]()
    embeds = torch.ones(1, 6, 16)
    for method in (
        PAG(layers="L1"),
        SoftPAG(heads="L1H0"),
        SLG(layers="L1", start=0.0, stop=1.0),
        NAG(negative_embeds=embeds),
    ):
        other = Own(**pipe.components)
        with (
            dit_accel.attach(other, method),
            torch.no_grad(),
            pytest.raises(
                ConfigError,
                match=rf"{method.name}.*which prompt.*Own.*transformer\.cache_context\(name\) .*adapter 'flux'",
            ),
        ):
            other(**call)
        same = Same(**pipe.components)
        same.set_progress_bar_config(disable=True)
        with dit_accel.attach(same, method):
            assert run("flux-kontext", same, call, (0,), (0,)).isfinite().all()


def test_a_subclass_that_hands_its_call_on_rescales_as_the_class_does():
    pipe, call = PIPELINES["qwen-image-edit"]()
    assert type(pipe).__name__ == "Small"
    with (
        dit_accel.attach(pipe, PAG(layers="L1")),
        pytest.raises(ConfigError, match=r"pag.*rescales.*norm"),
    ):
        run("qwen-image-edit", pipe, call, (0,), (0,))


def test_pipelines_with_perturbed_attention_of_their_own_are_refused():
    pipe, call = PIPELINES["sd3"]()
    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    other = diffusers.StableDiffusion3PAGPipeline(**parts, pag_applied_layers="blocks.1$")
    other.set_progress_bar_config(disable=True)
    with (
        dit_accel.attach(other.transformer, PAG(layers="L1")),
        pytest.raises(
            ConfigError,
            match=r"pag.*StableDiffusion3PAGPipeline.*perturbed attention",
        ),
    ):
        run("sd3", other, {**call, "pag_scale": 0.0}, (0,), (0,))


def test_beside_a_pipeline_s_own_skipped_layers_all_predictions_get_the_same():
    """SD3 runs the conditional prompt again without some layers: a third prediction, to which the same is added."""
    pipe, call = PIPELINES["sd3"]()
    call = {**call, "num_inference_steps": 1, "skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0,
            "skip_layer_guidance_start": -1.0}  # fmt: skip

    def added(scale, method):
        changed = {**call, "guidance_scale": scale}
        plain = run("sd3", pipe, changed, (0,), (0,))
        with dit_accel.attach(pipe, method) as attachment:
            made = run("sd3", pipe, changed, (0,), (0,))
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
    call = dit_accel.adapters.guidance.PipelineCall(None, ("BriaPipeline",), {"normalize": True})
    assert guidance.why_not_folded(call) == "normalize = True scales the guided prediction by the conditional one"
    quiet = dit_accel.adapters.guidance.PipelineCall(None, ("BriaPipeline",), {"normalize": False})
    assert guidance.why_not_folded(quiet) is None


def test_what_counts_is_the_pipeline_that_runs():
    """Not the one that methods were attached to: it may be none, or another that shares the transformer."""
    pipe, call = PIPELINES["qwen-image"]()
    with dit_accel.attach(pipe.transformer, BRANCHES["pag"]), REFUSED:
        run("qwen-image", pipe, call, (0,), (0,))
    text, call = PIPELINES["sd3"]()
    image, others = PIPELINES["sd3-img2img"]()
    image = diffusers.StableDiffusion3Img2ImgPipeline(**text.components)
    image.set_progress_bar_config(disable=True)
    made = []
    for owner in (image, text, text.transformer):
        text._guidance_scale = 1.0  # stale: this one does not run
        with dit_accel.attach(owner, BRANCHES["pag"]):
            made.append(run("sd3-img2img", image, others, (0, 1), (0, 0)))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
