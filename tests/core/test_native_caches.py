"""diffusers' own caches as methods: enabled and undone exactly, and refused by name where they fail or go wrong."""

import dataclasses
import re
import types

import pytest
import torch
from diffusers import BriaTransformer2DModel, FluxTransformer2DModel
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from tiny_models import FLUX, FLUX_KIN, MODELS, SD3, WAN
from wan_tiny import denoise, sharp_transformer, tiny_transformer

import dit_accel
from dit_accel import (
    ConfigError,
    RadialAttention,
    SoftPAG,
)
from dit_accel.adapters.installed import adapter_for
from dit_accel.methods import toml
from dit_accel.methods.caches.native_limits import CONFIGS, check_hooked
from dit_accel.testing.tiny_models import STEPS as FEW_STEPS
from dit_accel.testing.tiny_models import Case

STEPS = 6
ALWAYS = dict(threshold=1e9)


def mag(**options):
    return MagCacheConfig(**{"threshold": 10.0, "num_inference_steps": STEPS, "mag_ratios": [1.0] * STEPS, **options})


def taylor(**options):
    return TaylorSeerCacheConfig(
        **{"cache_interval": 3, "disable_cache_before_step": 2, "cache_identifiers": [r"blocks\.\d\.attn1"], **options}
    )


def pyramid(**options):
    usual = dict(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )  # fmt: skip
    return PyramidAttentionBroadcastConfig(**{**usual, **options})


CACHES = {
    "first block": FirstBlockCacheConfig(**ALWAYS),
    "mag": mag(retention_ratio=0.0),
    "taylor": taylor(),
    "taylor lite": taylor(cache_identifiers=None, use_lite_mode=True),
    "pyramid": pyramid(),
    "sea": SeaCacheConfig(**ALWAYS),
}
ALL = pytest.mark.parametrize("cache", CACHES)


@pytest.fixture
def transformer():
    return tiny_transformer()


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


@ALL
@pytest.mark.parametrize("call", [forward, without_context])
def test_branches_are_kept_apart_with_contexts_and_without(transformer, cache, call):
    """On inputs that stay, each branch gives what it gives alone; without a context its place in a step tells it."""
    branches = ("cond", "uncond")
    with dit_accel.attach(transformer, CACHES[cache]) as attachment:
        if cache == "sea" and call is without_context:
            with pytest.raises(ConfigError, match=r"sigma in \[0, 1\].*sigma = None"):
                call(transformer, 0)
            return
        together = [[call(transformer, step, branch) for branch in branches] for step in range(STEPS)]
        assert 0 < min(layers_run(attachment)) + 1 < 4
        for place, branch in enumerate(branches):
            alone = [call(transformer, step, branch) for step in range(STEPS)]
            assert all(torch.equal(both[place], out) for both, out in zip(together, alone, strict=True))


@ALL
def test_a_stopped_run_and_another_size_are_begun_anew(transformer, cache):
    plain = forward(transformer, 3, x=latents(3, 16))
    with dit_accel.attach(transformer, CACHES[cache]):
        first = [forward(transformer, step) for step in range(STEPS)]
        forward(transformer, 0), forward(transformer, 1)
        wide = [forward(transformer, step, x=latents(3, 16)) for step in range(3)]
        assert all(torch.equal(forward(transformer, step), first[step]) for step in range(3))
        if cache not in ("sea", "mag"):  # SeaCache looks at the size itself, MagCache goes on counting
            assert torch.equal(forward(transformer, 3, x=latents(3, 16)), plain)
    fresh = tiny_transformer()
    with dit_accel.attach(fresh, CACHES[cache]):
        assert all(torch.equal(forward(fresh, step, x=latents(3, 16)), out) for step, out in enumerate(wide))


def test_a_config_is_not_written_to_and_a_subclass_is_taken(transformer):
    @dataclasses.dataclass
    class Mine(FirstBlockCacheConfig):
        pass

    for config in (Mine(threshold=0.3), pyramid(spatial_attention_block_skip_range=None)):
        before = dict(vars(config))
        with dit_accel.attach(transformer, config):
            assert transformer._cache_config is not config
        assert vars(config) == before
    with dit_accel.attach(transformer, Mine(threshold=0.3)) as attachment:
        methods = attachment.report().to_dict()["methods"]
        assert methods["diffusers-cache"] == {"config": "Mine", "threshold": 0.3}


def test_the_report_tells_what_was_reused(transformer):
    with dit_accel.attach(transformer, FirstBlockCacheConfig(**ALWAYS)) as attachment:
        for step in range(4):
            forward(transformer, step), forward(transformer, step, "uncond")
        report = attachment.report()
        assert str(report.section("diffusers-cache")).splitlines() == [
            "diffusers' FirstBlockCacheConfig",
            "  on transformer: 3 modules hooked",
            "  transformer cond: 1 of 4 steps computed; attention ran in 6 of 12 layers",
            "  transformer uncond: 1 of 4 steps computed; attention ran in 6 of 12 layers",
        ]
        call = report.section("diffusers-cache").data["calls"][2]
        assert call == dict(transformer="transformer", branch="cond", step_index=1, layers_run=1, layers=3)
        assert [step.dense_layers for step in report.steps] == [3, 3, 1, 1, 1, 1, 1, 1]
        forward(transformer, 0)
        assert layers_run(attachment) == [3]  # of the run that began


def test_what_the_user_changes_meanwhile_stays_the_users(transformer):
    attachment = dit_accel.attach(transformer, FirstBlockCacheConfig(**ALWAYS))
    transformer.disable_cache()
    transformer.enable_cache(mag())
    attachment.detach()
    assert isinstance(transformer._cache_config, MagCacheConfig)
    assert forward(transformer, 0).isfinite().all()


def test_a_cache_that_can_not_be_enabled_leaves_nothing():
    bria = BriaTransformer2DModel(**FLUX_KIN[0].config).eval()  # diffusers knows its first blocks, not its single ones
    pipe = types.SimpleNamespace(components={"transformer": tiny_transformer(), "transformer_2": bria})
    before = [attributes(model) for model in pipe.components.values()]
    with pytest.raises(ConfigError, match=r"enable FirstBlockCacheConfig.*BriaTransformer2DModel.*not registered"):
        dit_accel.attach(pipe, FirstBlockCacheConfig())
    assert [attributes(model) for model in pipe.components.values()] == before
    assert dit_accel.attachment_of(bria) is None


def test_one_cache_a_transformer(transformer):
    with pytest.raises(ConfigError, match="FirstBlockCacheConfig and MagCacheConfig"):
        dit_accel.attach(transformer, FirstBlockCacheConfig(), mag())
    transformer.enable_cache(mag())
    with pytest.raises(ConfigError, match=r"FirstBlockCacheConfig.*MagCacheConfig.*pipe\.transformer\.disable_cache"):
        dit_accel.attach(transformer, FirstBlockCacheConfig())
    assert transformer.is_cache_enabled
    transformer.disable_cache()
    transformer._is_cached, transformer._context_manager = True, object()  # as cache-dit 1.5 leaves them
    with pytest.raises(ConfigError, match=r"cache-dit.*cache_dit\.disable_cache\(pipe\)"):
        dit_accel.attach(transformer, FirstBlockCacheConfig())


REFUSED_CONFIGS = {
    r"FirstBlockCacheConfig\.threshold.*> 0, got -0\.1": FirstBlockCacheConfig(threshold=-0.1),
    r"FirstBlockCacheConfig\.threshold.*> 0, got 0\.0": FirstBlockCacheConfig(threshold=0.0),
    r"FirstBlockCacheConfig\.threshold.*> 0, got nan": FirstBlockCacheConfig(threshold=float("nan")),
    r"MagCacheConfig\.threshold.*> 0, got 0\.0": mag(threshold=0.0),
    r"TaylorSeerCacheConfig\.cache_interval.*>= 1, got 0": taylor(cache_interval=0),
    r"disable_cache_before_step.*>= 1, got 0": taylor(disable_cache_before_step=0),
    r"max_order.*>= 0, got -1": taylor(max_order=-1),
    r"PyramidAttentionBroadcastConfig\.current_timestep_callback": pyramid(current_timestep_callback=None),
    r"current_timestep_callback=lambda: pipe\.current_timestep": FasterCacheConfig(),
    r"enable FasterCacheConfig.*Wan": FasterCacheConfig(current_timestep_callback=int, tensor_format="BSC"),
    r"PyramidAttentionBroadcastConfig.*no module.*Wan": pyramid(spatial_attention_block_identifiers=("nowhere",)),
    r"self-attention.*Wan.*cache_identifiers=\['blocks\\\\\.\\\\d\+\\\\\.attn1'\]": TaylorSeerCacheConfig(),
    r"self-attention of Wan": taylor(cache_identifiers=None, skip_predict_identifiers=[r"blocks\.\d"]),
    r"TextKVCacheConfig.*WanTransformer3DModel.*text keys": TextKVCacheConfig(),
}


@pytest.mark.parametrize("why", REFUSED_CONFIGS)
def test_what_would_fail_or_do_nothing_is_refused(transformer, why):
    before = attributes(transformer)
    with pytest.raises(ConfigError, match=why):
        dit_accel.attach(transformer, REFUSED_CONFIGS[why])
    assert attributes(transformer) == before


def test_the_identifiers_that_are_named_work(transformer):
    with pytest.raises(ConfigError) as refused:
        dit_accel.attach(transformer, TaylorSeerCacheConfig())
    named = eval(str(refused.value).partition("cache_identifiers=")[2].partition(", or")[0])
    with dit_accel.attach(transformer, taylor(cache_identifiers=named)) as attachment:
        assert "3 modules hooked" in str(attachment.report().section("diffusers-cache"))
    lite = TaylorSeerCacheConfig(use_lite_mode=True)
    for hooked, lacks in (({"proj_out"}, "no blocks"), ({"blocks.0.attn1"}, "no proj_out")):
        with pytest.raises(ConfigError, match=lacks):
            check_hooked("TaylorSeerCacheConfig", lite, transformer, adapter_for("WanTransformer3DModel"), hooked)


def test_models_on_which_a_cache_is_wrong_are_named():
    for model, config, why in (
        (WAN[2], FirstBlockCacheConfig(), r"FirstBlockCacheConfig.*WanVACETransformer3DModel.*control branch"),
        (WAN[1], SeaCacheConfig(), r"SeaCacheConfig.*WanTransformer3DModel.*raw_vision_callb"),
        (SD3[0], FirstBlockCacheConfig(), r"SD3Transformer2DModel.*enable_cache"),
    ):
        with pytest.raises(ConfigError, match=why):
            dit_accel.attach(model.transformer(**model.config).eval(), config)
    experts = {"transformer": tiny_transformer(), "transformer_2": tiny_transformer(1)}
    pipe = types.SimpleNamespace(components=experts)
    with pytest.raises(ConfigError, match=r"transformer_2.*attach\(pipe\.transformer_2, MagCache"):
        dit_accel.attach(pipe, mag())
    assert not experts["transformer"].is_cache_enabled
    with dit_accel.attach(pipe, FirstBlockCacheConfig()):
        assert all(expert.is_cache_enabled for expert in experts.values())


def test_noise_levels_and_steps_that_a_cache_can_not_follow(transformer):
    with dit_accel.attach(transformer, CACHES["sea"]):
        assert forward(transformer, 0, sigma=0.0).isfinite().all()
        with pytest.raises(ConfigError, match=r"sigma in \[0, 1\].*sigma = -0\.5"):
            forward(transformer, 0, sigma=-0.5)
    with dit_accel.attach(transformer, mag()):
        with pytest.raises(ConfigError, match=r"MagCacheConfig\.num_inference_steps = 6.*9 steps"):
            forward(transformer, 0, steps=9)
        forward(transformer, 0)
        with pytest.raises(ConfigError, match=r"MagCacheConfig.*scheduler.*twice"):
            forward(transformer, 0)
    guidance = SoftPAG(heads="L1H0", scale=2.0, start=0.5)
    refused = pytest.raises(ConfigError, match=r"FirstBlockCacheConfig.*'cond/softpag' in step 2.*'cond'.*start = 0")
    with dit_accel.attach(transformer, guidance, FirstBlockCacheConfig(**ALWAYS)), refused:
        denoise(transformer, 4)
    with dit_accel.attach(transformer, SoftPAG(heads="L1H0", scale=2.0, start=0.0), FirstBlockCacheConfig(**ALWAYS)):
        assert denoise(transformer, 4).isfinite().all()


@pytest.mark.parametrize("config", [FirstBlockCacheConfig(**ALWAYS), mag(retention_ratio=0.0)])
def test_what_a_controlnet_adds_between_blocks_is_refused(config):
    flux = FluxTransformer2DModel(**FLUX[0].config).eval()
    inputs = dict(FLUX[0].inputs(1))
    known = dict(step_index=0, num_inference_steps=STEPS)
    with dit_accel.attach(flux, config), torch.no_grad(), flux.cache_context("cond", **known):
        with pytest.raises(ConfigError, match=r"reuse.*controlnet_block_samples"):
            flux(**inputs, controlnet_block_samples=[torch.randn(1, 80, 32)])
        flux(**inputs, controlnet_block_samples=None)


def test_faster_cache_asks_for_two_halves(transformer):
    faster = FasterCacheConfig(current_timestep_callback=lambda: 500, attention_weight_callback=lambda module: 0.3)
    two = latents().repeat(2, 1, 1, 1, 1)
    with dit_accel.attach(transformer, faster):
        for x, branch in ((latents(), "cond_uncond"), (two, "cond")):
            with pytest.raises(ConfigError, match=rf"batched call.*'{branch}'.*\[\d, 12, 5"):
                forward(transformer, 0, branch, x)
    wrong = dataclasses.replace(faster, tensor_format="BFCHW")
    with dit_accel.attach(transformer, wrong), pytest.raises(ConfigError, match=r"'BFCHW'.*latents.*\["):
        forward(transformer, 0, "cond_uncond", two)
    image = WAN[1].transformer(**WAN[1].config).eval()
    refused = pytest.raises(ConfigError, match=r"encoder_hidden_states_image.*branches")
    with dit_accel.attach(image, faster), torch.no_grad(), image.cache_context("cond_uncond"), refused:
        image(**WAN[1].inputs(2))
    now = [500]
    distilled = dataclasses.replace(faster, current_timestep_callback=lambda: now[0], is_guidance_distilled=True)
    with dit_accel.attach(transformer, distilled) as attachment:
        with pytest.raises(ConfigError, match=r"first step.*timestep 500.*spatial_"):
            forward(transformer, 0)
        for step in range(4):
            now[0] = 900 - 200 * step
            assert forward(transformer, step).isfinite().all()
        assert sum(layers_run(attachment)) < 12


def test_it_has_no_switch_and_no_table(transformer, capsys):
    from dit_accel.cli.lists import methods
    from dit_accel.methods import registry

    assert "diffusers-cache" not in registry.methods()
    assert "diffusers-cache" not in str(dit_accel.describe(transformer))
    with pytest.raises(ConfigError, match=r"method.*'diffusers-cache'"):
        toml.from_toml("[diffusers-cache]\n")
    with pytest.raises(ConfigError, match=r"FirstBlockCacheConfig.*TOML"):
        toml.to_toml([FirstBlockCacheConfig()])
    methods()
    printed = " ".join(capsys.readouterr().out.split())
    assert "attach() also takes diffusers' own FasterCacheConfig, FirstBlockCacheConfig, MagCacheConfig," in printed
    with pytest.raises(ConfigError, match=r"got <class.*FirstBlockCacheConfig'>.*DBCache.*Faster"):
        dit_accel.attach(transformer, FirstBlockCacheConfig)


def test_diffusers_still_has_the_defects_that_are_refused_or_put_right(transformer):
    """If one of these fails, diffusers has mended something: the guard can go."""
    ran = []
    for block in transformer.blocks:
        block.attn1.register_forward_pre_hook(lambda *call: ran.append(1))

    def layers(*steps):
        ran.clear()
        for step in steps:
            forward(transformer, *step)
        return len(ran)

    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert layers((0,), (1,)) == 4
    with pytest.raises(RuntimeError, match=r"tensor a.*tensor b"):
        forward(transformer, 0, x=latents(5, 16))
    with pytest.raises(ValueError, match="cache context"):
        without_context(transformer, 0)
    transformer.disable_cache()
    assert "forward" in transformer.blocks[0].__dict__
    transformer.enable_cache(mag(threshold=0.0, retention_ratio=0.0))
    assert layers((0,), (1,)) == 3
    transformer.disable_cache()
    transformer.enable_cache(pyramid())
    uncond = forward(tiny_transformer(), 0, "uncond")
    assert layers((0, "cond"), (0, "uncond")) == 6
    transformer._reset_stateful_cache()
    forward(transformer, 0, "cond")
    assert not torch.allclose(forward(transformer, 0, "uncond"), uncond, atol=1e-3)
    transformer.disable_cache()
    transformer.enable_cache(TaylorSeerCacheConfig())
    assert layers(*[(step,) for step in range(8)]) == 24


def test_reused_layers_are_neither_planned_nor_counted():
    transformer, planned = sharp_transformer(), []
    sparse = RadialAttention(block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=0, dense_layers=0)
    with dit_accel.attach(transformer, sparse, FirstBlockCacheConfig(threshold=0.4)) as attachment:
        with attachment.observe(lambda call: planned.append((call.context.step_index, call.context.branch))):
            denoise(transformer, STEPS)
        report = attachment.report()
        calls = report.section("diffusers-cache").data["calls"]
    assert 0 < sum(call["layers_run"] for call in calls) < STEPS * 2 * 3
    assert [(step.step_index, step.branch, step.dense_layers + step.sparse_layers) for step in report.steps] == [
        (call["step_index"], call["branch"], call["layers_run"]) for call in calls
    ]
    assert all(planned.count((step.step_index, step.branch)) == step.sparse_layers for step in report.steps)


# On a tiny model of every family: what works reuses rightly, what does not is refused at once.

FACTORS = dict(taylor_factors_dtype=torch.float32, disable_cache_before_step=2, cache_interval=3)
FAMILY_CACHES = {
    "first block": FirstBlockCacheConfig(**ALWAYS),
    "mag": MagCacheConfig(threshold=10.0, num_inference_steps=FEW_STEPS, mag_ratios=[1.0] * FEW_STEPS),
    "taylor": TaylorSeerCacheConfig(**FACTORS),
    "taylor lite": TaylorSeerCacheConfig(**FACTORS, use_lite_mode=True),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "faster": FasterCacheConfig(
        current_timestep_callback=lambda: 500, alpha_low_frequency=1.0, alpha_high_frequency=1.0,
        attention_weight_callback=lambda module: 0.0,
    ),
    "sea": SeaCacheConfig(**ALWAYS),
    "sea told": SeaCacheConfig(**ALWAYS, raw_vision_callback=lambda *call: [torch.ones(4, 5, 8, 8)]),
    "text": TextKVCacheConfig(),
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

UNREGISTERED = r"diffusers can't enable \w+ on \w+: Model class .* not registered\.; use another cache"
REFUSED = {
    "first block": rf"{UNREGISTERED}|does not work on \w+: (its control|it calls|its first)",
    "mag": rf"{UNREGISTERED}|does not work on \w+: (its control|it calls|its first)",
    "taylor": r"predicts no self-attention of \w+: .*; set cache_identifiers=\[.+\], or use_lite_mode=True",
    "taylor lite": r"finds in \w+ (no blocks that its pattern matches|no proj_out to predict); leave it off and set",
    "faster": r"tensor_format = .* is not how the latents lie: .*set the format|would not split \w+.*; add them to",
    "sea": rf"knows no latents of \w+ and would compute every step; set raw_vision|does not work on|{UNREGISTERED}",
    "sea told": rf"{UNREGISTERED}|does not work on \w+: (its control|its first)",
    "text": r"does nothing on \w+: diffusers knows the text keys of NucleusMoE-Image alone",
    "pyramid": "never",
}

QUICK = ("wan", "sd3", "flux-kin", "cosmos-3")
CASES = [
    pytest.param(
        family, number, id=f"{family} {number}",
        marks=[] if family in QUICK else [pytest.mark.slow] if number == 0 else [pytest.mark.slow, pytest.mark.rare],
    )
    for family, models in MODELS.items()
    for number in range(len(models))
]  # fmt: skip


def attached_runs(case, config):
    """Run three steps of two branches on the same inputs; return the largest error, and layers that ran, of all."""
    calls = [(case.inputs(2), "cond_uncond")] if isinstance(config, FasterCacheConfig) else []
    calls = calls or [(case.inputs(1), "cond"), (case.inputs(2), "uncond")]
    plain = [case.run(inputs, branch=branch) for inputs, branch in calls]
    error = 0.0
    with dit_accel.attach(case.transformer, config) as attachment:
        for step in range(FEW_STEPS):
            for (inputs, branch), expected in zip(calls, plain, strict=True):
                known = dict(step_index=step, num_inference_steps=FEW_STEPS, sigma=1 - step / FEW_STEPS)
                with torch.no_grad(), case.transformer.cache_context(branch, **known):
                    out = case.transformer(**inputs, return_dict=False)
                out = out if isinstance(out, torch.Tensor) else out[0]
                out = out if isinstance(out, torch.Tensor) else out[-1]  # a list where a forward takes one row
                error = max(error, float((out - expected).abs().max() / expected.abs().max()))
        counted = attachment.report().section("diffusers-cache").data["calls"]
    return error, sum(call["layers_run"] for call in counted), sum(call["layers"] for call in counted)


@pytest.mark.parametrize(("family", "number"), CASES)
def test_frozen_inputs_give_what_was_computed_or_the_model_is_refused(family, number):
    """What a cache reuses on inputs that stay is what the model computes on them."""
    model, named = MODELS[family][number], f"{family} {number}"
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
