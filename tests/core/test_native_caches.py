"""diffusers' own caches as methods: enabled and undone exactly, and refused by name where they fail or go wrong."""

import dataclasses
import re
import types

import pytest
import torch
from diffusers import BriaTransformer2DModel, FluxTransformer2DModel, hooks
from tiny_models import FLUX, FLUX_KIN, MODELS
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError, SoftPAG
from dit_accel.adapters.installed import adapter_for
from dit_accel.methods.caches.native_limits import CONFIGS, check_call, check_hooked
from dit_accel.testing.tiny_models import STEPS as FEW_STEPS
from dit_accel.testing.tiny_models import Case

STEPS = 6
ALWAYS = dict(threshold=1e9)
FIRST_BLOCK = hooks.FirstBlockCacheConfig(**ALWAYS)


def mag(steps=STEPS, **options):
    usual = dict(threshold=10.0, num_inference_steps=steps, mag_ratios=[1.0] * steps)
    return hooks.MagCacheConfig(**{**usual, **options})


def taylor(**options):
    usual = dict(cache_interval=3, disable_cache_before_step=2, cache_identifiers=[r"blocks\.\d\.attn1"])
    return hooks.TaylorSeerCacheConfig(**{**usual, **options})


def pyramid(**options):
    every = dict(spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001))
    return hooks.PyramidAttentionBroadcastConfig(**{**every, "current_timestep_callback": lambda: 500, **options})


CACHES = {
    "first block": FIRST_BLOCK,
    "mag": mag(retention_ratio=0.0),
    "taylor": taylor(),
    "taylor lite": taylor(cache_identifiers=None, use_lite_mode=True),
    "pyramid": pyramid(),
    "sea": hooks.SeaCacheConfig(**ALWAYS),
}
ALL = pytest.mark.parametrize("cache", CACHES)


def latents(frames=5, width=8):
    return torch.randn(1, 12, frames, 8, width, generator=torch.Generator().manual_seed(3))


def text(branch):
    return torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(len(branch)))


def forward(model, step, branch="cond", x=None, steps=STEPS, sigma=None):
    known = dict(step_index=step, num_inference_steps=steps, sigma=1 - step / steps if sigma is None else sigma)
    with torch.no_grad(), model.cache_context(branch, **known):
        return model(latents() if x is None else x, torch.tensor([500]), text(branch), return_dict=False)[0]


def without_context(model, step, branch="cond"):
    """A forward of a pipeline that opens no contexts: the timestep alone tells the step."""
    with torch.no_grad():
        return model(latents(), torch.tensor([900 - 100 * step]), text(branch), return_dict=False)[0]


def layers_run(attachment):
    """Attention layers that ran, by forward."""
    return [call["layers_run"] for call in attachment.report().section("diffusers-cache").data["calls"]]


def attributes(model):
    return {name: set(module.__dict__) for name, module in model.named_modules()}


@ALL
def test_attach_enables_and_detach_leaves_the_model_that_was(transformer, cache):
    untouched = attributes(transformer)
    with dit_accel.attach(transformer, CACHES[cache]):
        assert transformer.is_cache_enabled
    assert attributes(transformer) == untouched
    plain = forward(transformer, 0)
    before, native = attributes(transformer), tiny_transformer()  # a context leaves a registry, cached or not
    native.enable_cache(CACHES[cache])
    with dit_accel.attach(transformer, CACHES[cache]) as attachment:
        for step in range(STEPS):  # a run is what diffusers makes of it
            x = latents() * (1 + 0.1 * step)
            assert torch.equal(forward(transformer, step, x=x), forward(native, step, x=x))
        assert 0 < sum(layers_run(attachment)) < STEPS * 3
    assert not transformer.is_cache_enabled
    assert attributes(transformer) == before
    assert torch.equal(forward(transformer, 0), plain)
    attachment = dit_accel.attach(transformer, CACHES[cache])
    transformer.disable_cache()
    transformer.enable_cache(FIRST_BLOCK)
    attachment.detach()  # what the user changed meanwhile stays the user's
    assert transformer._cache_config is FIRST_BLOCK


@ALL
def test_branches_are_kept_apart_with_contexts_and_without(transformer, cache):
    """On inputs that stay, each branch gives what it gives alone; without a context its place in a step tells it."""
    branches = ("cond", "uncond")
    for call in (forward,) if cache == "sea" else (forward, without_context):
        with dit_accel.attach(transformer, CACHES[cache]) as attachment:
            together = [[call(transformer, step, branch) for branch in branches] for step in range(STEPS)]
            assert min(layers_run(attachment)) < 3
            for place, branch in enumerate(branches):
                alone = [call(transformer, step, branch) for step in range(STEPS)]
                assert all(torch.equal(both[place], out) for both, out in zip(together, alone, strict=True))


@ALL
def test_a_stopped_run_and_another_size_are_begun_anew(transformer, cache):
    large = latents(3, 16)
    with dit_accel.attach(transformer, CACHES[cache]):
        wide = [forward(transformer, step, x=large) for step in range(3)]
        first = [forward(transformer, step) for step in range(STEPS)]
        forward(transformer, 0), forward(transformer, 1)
        assert all(torch.equal(forward(transformer, step, x=large), out) for step, out in enumerate(wide))
        assert all(torch.equal(forward(transformer, step), first[step]) for step in range(3))
        grown = forward(transformer, 3, x=large)
    # SeaCache looks at the size itself, MagCache goes on counting
    assert cache in ("sea", "mag") or torch.equal(grown, forward(transformer, 3, x=large))


def test_a_config_is_not_written_to_and_the_report_tells_it_and_what_was_reused(transformer):
    @dataclasses.dataclass
    class Mine(hooks.FirstBlockCacheConfig):
        pass

    for config in (pyramid(spatial_attention_block_skip_range=None), Mine(**ALWAYS)):
        before = dict(vars(config))
        with dit_accel.attach(transformer, config) as attachment:
            for step in range(4):
                forward(transformer, step), forward(transformer, step, "uncond")
            report = attachment.report()
            forward(transformer, 0)
            assert layers_run(attachment) == [3]  # of the run that began
        assert vars(config) == before
    assert report.to_dict()["methods"]["diffusers-cache"] == {"config": "Mine", **ALWAYS}
    section = report.section("diffusers-cache")
    assert section.lines[0] == "on transformer: 3 modules hooked"
    assert section.lines[2] == "transformer uncond: 1 of 4 steps computed; attention ran in 6 of 12 layers"
    call = dict(transformer="transformer", branch="cond", step_index=1, layers_run=1, layers=3)
    assert section.data["calls"][2] == call
    why = [(entry["reused"], entry["reason"]) for entry in section.data["forwards"]]
    assert why == [(False, "its own rule")] * 2 + [(True, "measured")] * 6
    assert [step.dense_layers for step in report.steps] == [3, 3, 1, 1, 1, 1, 1, 1]


REFUSED_CONFIGS = {
    r"FirstBlockCacheConfig\.threshold.*got -0\.1": hooks.FirstBlockCacheConfig(threshold=-0.1),
    r"FirstBlockCacheConfig\.threshold.*got nan": hooks.FirstBlockCacheConfig(threshold=float("nan")),
    r"MagCacheConfig\.threshold.*got 0\.0": mag(threshold=0.0),
    r"cache_interval.*>= 1, got 0": taylor(cache_interval=0),
    r"cache_interval.*got 2\.5": taylor(cache_interval=2.5),
    r"disable_cache_before_step.*>= 1, got 0": taylor(disable_cache_before_step=0),
    r"max_order.*>= 0, got -1": taylor(max_order=-1),
    r"PyramidAttentionBroadcastConfig\.current_timestep_callback": pyramid(current_timestep_callback=None),
    r"current_timestep_callback=lambda": hooks.FasterCacheConfig(),
    r"enable FasterCacheConfig.*Wan": hooks.FasterCacheConfig(current_timestep_callback=int, tensor_format="BSC"),
    r"PyramidAttentionBroadcastConfig.*no module.*Wan": pyramid(spatial_attention_block_identifiers=("nowhere",)),
    r"self-attention of Wan": taylor(skip_predict_identifiers=[r"blocks\.\d\.attn1"]),
    r"TextKVCacheConfig.*Wan.*text keys": hooks.TextKVCacheConfig(),
}


def test_what_would_fail_or_do_nothing_is_refused(transformer):
    before = attributes(transformer)
    for why, config in REFUSED_CONFIGS.items():
        with pytest.raises(ConfigError, match=why):
            dit_accel.attach(transformer, config)
    with pytest.raises(ConfigError, match="FirstBlockCacheConfig and MagCacheConfig"):
        dit_accel.attach(transformer, hooks.FirstBlockCacheConfig(), mag())
    assert attributes(transformer) == before
    dit_accel.attach(transformer, taylor(cache_interval=1, disable_cache_before_step=1, max_order=0)).detach()
    transformer.enable_cache(mag())
    for config in (hooks.FirstBlockCacheConfig(), dit_accel.FirstBlockCache()):
        with pytest.raises(ConfigError, match=r"FirstBlockCache.*MagCacheConfig.*disable_cache"):
            dit_accel.attach(transformer, config)
    assert transformer.is_cache_enabled
    transformer.disable_cache()
    transformer._is_cached = True
    dit_accel.attach(transformer, FIRST_BLOCK).detach()
    transformer._context_manager = object()  # as cache-dit 1.5 leaves it beside that
    with pytest.raises(ConfigError, match=r"cache-dit.*cache_dit\.disable_cache\(pipe\)"):
        dit_accel.attach(transformer, hooks.FirstBlockCacheConfig())


def test_the_identifiers_that_are_named_work(transformer):
    with pytest.raises(ConfigError, match="cache_identifiers=") as refused:
        dit_accel.attach(transformer, hooks.TaylorSeerCacheConfig())
    named = eval(str(refused.value).partition("cache_identifiers=")[2].partition(", or")[0])
    with dit_accel.attach(transformer, taylor(cache_identifiers=named)) as attachment:
        assert "3 modules hooked" in str(attachment.report().section("diffusers-cache"))
    lite = hooks.TaylorSeerCacheConfig(use_lite_mode=True)
    on = "TaylorSeerCacheConfig", lite, transformer, adapter_for("WanTransformer3DModel")
    for hooked, lacks in (({"proj_out"}, "no blocks"), ({"blocks.0.attn1"}, "no proj_out")):
        with pytest.raises(ConfigError, match=lacks):
            check_hooked(*on, hooked)
    check_hooked(*on, {"proj_out", "blocks.0.attn1"})


def test_models_on_which_a_cache_is_wrong_are_named():
    with pytest.raises(ConfigError, match=r"SeaCacheConfig.*WanTransformer3DModel.*raw_vision_callb"):
        dit_accel.attach(tiny_transformer(in_channels=16), hooks.SeaCacheConfig())
    bria = BriaTransformer2DModel(**FLUX_KIN[0].config).eval()  # diffusers knows its first blocks, not its single ones
    pipe = types.SimpleNamespace(components={"transformer": tiny_transformer(), "transformer_2": bria})
    before = [attributes(model) for model in pipe.components.values()]
    with pytest.raises(ConfigError, match=r"enable FirstBlockCacheConfig.*BriaTransformer2DModel.*not registered"):
        dit_accel.attach(pipe, hooks.FirstBlockCacheConfig())
    assert [attributes(model) for model in pipe.components.values()] == before
    assert dit_accel.attachment_of(bria) is None
    pipe.components["transformer_2"] = tiny_transformer(1)
    with pytest.raises(ConfigError, match=r"transformer_2.*attach\(pipe\.transformer_2, MagCache"):
        dit_accel.attach(pipe, mag())
    assert not pipe.components["transformer"].is_cache_enabled
    with dit_accel.attach(pipe, hooks.FirstBlockCacheConfig()):
        assert all(expert.is_cache_enabled for expert in pipe.components.values())


def test_noise_levels_and_steps_that_a_cache_can_not_follow(transformer):
    with dit_accel.attach(transformer, CACHES["sea"]):
        assert forward(transformer, 0, sigma=0.0).isfinite().all()
        for level in (-0.5, 1.5):
            about = types.SimpleNamespace(inputs={}, beside=None, share_of_noise=level, num_inference_steps=4)
            with pytest.raises(ConfigError, match=rf"sigma in \[0, 1\].*sigma = {level}"):
                check_call("SeaCacheConfig", None, about, None, None, ())
        with pytest.raises(ConfigError, match="sigma = None"):
            without_context(transformer, 0)
    with dit_accel.attach(transformer, mag()):
        with pytest.raises(ConfigError, match=r"MagCacheConfig\.num_inference_steps = 6.*9 steps"):
            forward(transformer, 0, steps=9)
        forward(transformer, 0)
        with pytest.raises(ConfigError, match=r"MagCacheConfig.*scheduler.*twice"):
            forward(transformer, 0)
    late, early = (SoftPAG(heads="L1H0", scale=2.0, start=start) for start in (0.25, 0.0))
    refused = pytest.raises(ConfigError, match=r"FirstBlockCacheConfig.*'cond/softpag' in step 1.*'cond'.*start = 0")
    with dit_accel.attach(transformer, early, FIRST_BLOCK):
        assert denoise(transformer, 4).isfinite().all()
    with dit_accel.attach(transformer, late, FIRST_BLOCK), refused:
        denoise(transformer, 4)


def test_what_a_controlnet_adds_between_blocks_is_refused():
    flux, inputs = FluxTransformer2DModel(**FLUX[0].config).eval(), FLUX[0].inputs(1)
    for config in (FIRST_BLOCK, mag(retention_ratio=0.0)):
        known = dict(step_index=0, num_inference_steps=STEPS)
        with dit_accel.attach(flux, config), torch.no_grad(), flux.cache_context("cond", **known):
            with pytest.raises(ConfigError, match=r"reuse.*controlnet_block_samples"):
                flux(**inputs, controlnet_block_samples=[torch.randn(1, 80, 32)])
            flux(**inputs, controlnet_block_samples=None)


def test_faster_cache_asks_for_two_halves(transformer):
    fixed = dict(current_timestep_callback=lambda: 500, attention_weight_callback=lambda module: 0.3)
    faster = hooks.FasterCacheConfig(**fixed)
    two = latents().repeat(2, 1, 1, 1, 1)
    with dit_accel.attach(transformer, faster):
        for x, branch in ((latents(), "cond_uncond"), (two, "cond")):
            with pytest.raises(ConfigError, match=rf"batched call.*'{branch}'.*\[\d, 12, 5"):
                forward(transformer, 0, branch, x)
    wrong = dataclasses.replace(faster, tensor_format="BFCHW")
    with dit_accel.attach(transformer, wrong), pytest.raises(ConfigError, match=r"'BFCHW'.*latents.*\["):
        forward(transformer, 0, "cond_uncond", two)
    refused = pytest.raises(ConfigError, match=r"encoder_hidden_states_image.*branches")
    with dit_accel.attach(transformer, faster), transformer.cache_context("cond_uncond"), refused:
        transformer(two, torch.tensor([500]), text("both"), encoder_hidden_states_image=torch.zeros(2, 1, 8))
    now = [500]
    distilled = dataclasses.replace(faster, current_timestep_callback=lambda: now[0], is_guidance_distilled=True)
    later = dataclasses.replace(distilled, spatial_attention_timestep_skip_range=(500, 681))
    with dit_accel.attach(transformer, later):
        forward(transformer, 0)
    with dit_accel.attach(transformer, distilled) as attachment:
        with pytest.raises(ConfigError, match=r"first step.*timestep 500.*spatial_"):
            forward(transformer, 0)
        for step in range(4):
            now[0] = 900 - 200 * step
            assert forward(transformer, step).isfinite().all()
        assert sum(layers_run(attachment)) < 12


# On a tiny model of every family: what works reuses rightly, what does not is refused at once.

FACTORS = dict(taylor_factors_dtype=torch.float32, disable_cache_before_step=2, cache_interval=3)
FAMILY_CACHES = {
    "first block": FIRST_BLOCK,
    "mag": mag(FEW_STEPS),
    "taylor": hooks.TaylorSeerCacheConfig(**FACTORS),
    "taylor lite": hooks.TaylorSeerCacheConfig(**FACTORS, use_lite_mode=True),
    "pyramid": pyramid(spatial_attention_timestep_skip_range=(100, 800)),
    "faster": hooks.FasterCacheConfig(
        current_timestep_callback=lambda: 500, alpha_low_frequency=1.0, alpha_high_frequency=1.0,
        attention_weight_callback=lambda module: 0.0,
    ),
    "sea": hooks.SeaCacheConfig(**ALWAYS),
    "sea told": hooks.SeaCacheConfig(**ALWAYS, raw_vision_callback=lambda *call: [torch.ones(4, 5, 8, 8)]),
    "text": hooks.TextKVCacheConfig(),
}  # fmt: skip
assert {type(config).__name__ for config in FAMILY_CACHES.values()} == set(CONFIGS)

_BLOCKS = (
    "wan 0, wan 1, hunyuan-video 0, hunyuan-video 1, hunyuan-video 2, mochi 0, cogvideox 0, cogvideox 1, ltx 0, ltx 1, "
    "flux 0, qwen-image 0, qwen-image 1, hunyuan-image 0, hunyuan-image 1, cogview 1, framepack 0"
)
WORKS = {
    "first block": _BLOCKS,
    "mag": f"{_BLOCKS}, flux2 0, flux2 1, kandinsky-5 0",
    "taylor": "hunyuan-video 0, hunyuan-video 1, hunyuan-video 2, flux 0, flux-kin 0, flux-kin 1, flux-kin 2, "
    "qwen-image 0, qwen-image 1, flux2 0, flux2 1, chroma 0, qwen-image-2.1 0, hunyuan-image 0, hunyuan-image 1, "
    "nucleus-image 0, hunyuan-video-1.5 0, minimax-h3 0, framepack 0, motif-video 0",
    "faster": "wan 0, wan 3, mochi 0, hunyuan-image 1, skyreels-v2 0, skyreels-v2 1, helios 1, allegro 0",
    "sea": "wan 0, cosmos-3 0, cosmos-3 1",
    "sea told": f"{_BLOCKS}, kandinsky-5 0, cosmos-3 0, cosmos-3 1",
    "text": "nucleus-image 0",
}
"""Cache -> the models on which it works as it is set here; of those that have `enable_cache`."""
FAILS = {"taylor lite": "kandinsky-5 0, kandinsky-6 0, cosmos-3 0, cosmos-3 1", "pyramid": ""}
"""The same for caches that work on nearly all: on which they do not."""

WRONG = r"can't enable \w+ on \w+: .* not registered|does not work on \w+: (its control|its first|it calls)"
REFUSED = {
    "first block": WRONG, "mag": WRONG, "sea told": WRONG, "sea": rf"{WRONG}|no latents of \w+ .*; set raw_vision",
    "taylor": r"self-attention of \w+: .*; set cache_identifiers=\[.+\]", "taylor lite": r"no (blocks|proj_out) ",
    "faster": r"tensor_format = .*: .*set the format|would not split \w+.*; add them to", "text": "NucleusMoE-Image",
}  # fmt: skip

QUICK = ("wan 0", "wan 2", "sd3 0", "flux-kin 0", "cosmos-3 0")
SLOW = [pytest.mark.slow], [pytest.mark.slow, pytest.mark.rare]
CASES = [
    pytest.param(named, marks=() if named in QUICK else SLOW[named[-2:] != " 0"])
    for named in (f"{family} {number}" for family, models in MODELS.items() for number in range(len(models)))
]


def attached_runs(case, config):
    """Run three steps of two branches on the same inputs; return the largest error, and layers that ran, of all."""
    calls = [(case.inputs(1), "cond"), (case.inputs(2), "uncond")]
    if isinstance(config, hooks.FasterCacheConfig):
        calls = [(case.inputs(2), "cond_uncond")]
    plain, errors = [case.run(inputs, branch=branch) for inputs, branch in calls], []
    with dit_accel.attach(case.transformer, config) as attachment:
        for step in range(FEW_STEPS):
            for (inputs, branch), expected in zip(calls, plain, strict=True):
                out = case.run(inputs, step, branch)
                errors.append(float((out - expected).abs().max() / expected.abs().max()))
        counted = attachment.report().section("diffusers-cache").data["calls"]
    return max(errors), sum(call["layers_run"] for call in counted), sum(call["layers"] for call in counted)


@pytest.mark.parametrize("named", CASES)
def test_frozen_inputs_give_what_was_computed_or_the_model_is_refused(named):
    """What a cache reuses on inputs that stay is what the model computes on them."""
    family, number = named.split()
    model = MODELS[family][int(number)]
    case = Case(adapter_for(model.transformer.__name__), model)
    before = attributes(case.transformer)
    before[""].discard("_diffusers_hook")  # a context makes one, cached or not
    for cache, config in FAMILY_CACHES.items():
        refusal = ""
        try:
            error, ran, of = attached_runs(case, config)
        except ConfigError as raised:
            refusal = str(raised)
        if not hasattr(case.transformer, "enable_cache"):
            assert re.search(rf"{model.transformer.__name__}.*enable_cache", refusal), cache
            continue
        works = named in WORKS[cache].split(", ") if cache in WORKS else named not in FAILS[cache].split(", ")
        assert works == (not refusal), (cache, refusal)
        if refusal:
            assert re.search(REFUSED[cache], refusal), refusal
        else:
            assert error < 1e-3, cache
            assert ran == of if cache == "text" else 0 < ran < of, cache
        case.transformer.__dict__.pop("_diffusers_hook", None)
        assert attributes(case.transformer) == before, cache
