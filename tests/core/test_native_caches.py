"""diffusers' own caches as methods: enabled and undone exactly, their known defects put right or refused by name."""

import dataclasses
import types

import pytest
import torch
from diffusers import BriaTransformer2DModel, FluxTransformer2DModel
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from tiny_models import FLUX, FLUX_KIN, SD3, WAN
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import ConfigError
from dit_accel.adapters.installed import adapter_for
from dit_accel.methods import toml
from dit_accel.methods.caches.native_limits import check_hooked

STEPS = 6
ALWAYS = dict(threshold=1e9)


def mag(**options):
    return MagCacheConfig(**{"threshold": 10.0, "num_inference_steps": STEPS, "mag_ratios": [1.0] * STEPS, **options})


def taylor(**options):
    return TaylorSeerCacheConfig(
        **{"cache_interval": 3, "disable_cache_before_step": 2, "cache_identifiers": [r"blocks\.\d\.attn1"], **options}
    )


def pyramid(**options):
    given = dict(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )  # fmt: skip
    return PyramidAttentionBroadcastConfig(**{**given, **options})


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


def forward(model, step, branch="cond", x=None, steps=STEPS, **options):
    told = dict(step_index=step, num_inference_steps=steps, sigma=1 - step / steps)
    with torch.no_grad(), model.cache_context(branch, **told):
        return model(latents() if x is None else x, torch.tensor([500]), text(branch), return_dict=False, **options)[0]


def untold(model, step, branch="cond", x=None):
    """A forward of a pipeline that opens no contexts: the timestep alone tells the step."""
    with torch.no_grad():
        time = torch.tensor([900 - 100 * step])
        return model(latents() if x is None else x, time, text(branch), return_dict=False)[0]


def layers_run(attachment, branch=None):
    """Attention layers that ran by step, of one branch or all."""
    calls = attachment.report().section("diffusers-cache").data["calls"]
    return [call["layers_run"] for call in calls if branch in (None, call["branch"])]


def attributes(model):
    return {name: set(module.__dict__) for name, module in model.named_modules()}


@ALL
@pytest.mark.parametrize("ran_before", [True, False])
def test_attach_enables_and_detach_leaves_the_model_that_was(transformer, cache, ran_before):
    before = attributes(transformer)
    plain = [forward(transformer, step) for step in range(2)] if ran_before else None
    if ran_before:
        before = attributes(transformer)  # a context leaves a registry on the model, cached or not
    with dit_accel.attach(transformer, CACHES[cache]) as attachment:
        assert transformer.is_cache_enabled
        if ran_before:
            forward(transformer, 0), forward(transformer, 1), forward(transformer, 2)
            assert min(layers_run(attachment)) < 3
    assert not transformer.is_cache_enabled
    assert attributes(transformer) == before
    if ran_before:
        assert torch.equal(forward(transformer, 0), plain[0])


@ALL
def test_a_run_is_what_enable_cache_makes_of_it(cache):
    """Where diffusers is right, nothing is changed; Pyramid Attention Broadcast mixes the branches by itself."""
    x = [latents() * scale for scale in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5)]
    native, ours = tiny_transformer(), tiny_transformer()
    native.enable_cache(CACHES[cache])
    branches = ("cond",) if cache == "pyramid" else ("cond", "uncond")
    with dit_accel.attach(ours, CACHES[cache]) as attachment:
        for step in range(STEPS):
            for branch in branches:
                assert torch.equal(forward(ours, step, branch, x[step]), forward(native, step, branch, x[step]))
        ran = layers_run(attachment)
    assert 0 < sum(ran) < STEPS * len(branches) * 3


@ALL
@pytest.mark.parametrize("call", [forward, untold])
def test_branches_are_kept_apart_with_contexts_and_without(transformer, cache, call):
    """On inputs that stay, each branch gives what it gives alone: diffusers fails here, or mixes them.

    The second branch is told from the first by its place among the calls of a step where no context tells it.
    """
    if cache == "sea" and call is untold:
        refused = pytest.raises(ConfigError, match=r"sigma in \[0, 1\].*sigma = None")
        with dit_accel.attach(transformer, CACHES[cache]), refused:
            call(transformer, 0)
        return
    branches = ("cond", "uncond")

    def run(*alone):
        return [[call(transformer, step, branch) for branch in alone or branches] for step in range(STEPS)]

    with dit_accel.attach(transformer, CACHES[cache]) as attachment:
        together = run()
        assert 0 < min(layers_run(attachment)) + 1 < 4
        for branch in branches:
            for both, (one,) in zip(together, run(branch), strict=True):
                assert torch.equal(both[branches.index(branch)], one)


def test_seacache_takes_the_last_noise_level_too(transformer):
    with dit_accel.attach(transformer, CACHES["sea"]), torch.no_grad():
        for step, sigma in enumerate((1.0, 0.5, 0.0)):
            with transformer.cache_context("cond", step_index=step, num_inference_steps=3, sigma=sigma):
                transformer(latents(), torch.tensor([500]), text("cond"), return_dict=False)
        refused = pytest.raises(ConfigError, match=r"sigma in \[0, 1\].*sigma = -0\.5")
        with refused, transformer.cache_context("cond", step_index=0, num_inference_steps=3, sigma=-0.5):
            transformer(latents(), torch.tensor([500]), text("cond"), return_dict=False)


@ALL
def test_a_run_after_one_that_was_stopped_begins_anew(transformer, cache):
    with dit_accel.attach(transformer, CACHES[cache]):
        first = [forward(transformer, step) for step in range(STEPS)]
        forward(transformer, 0), forward(transformer, 1)
        wide = [forward(transformer, step, x=latents(3, 16)) for step in range(4)]
        assert torch.equal(forward(transformer, 0), first[0])
        assert all(torch.equal(forward(transformer, step), first[step]) for step in range(1, STEPS))
        fresh = tiny_transformer()
        with dit_accel.attach(fresh, CACHES[cache]):
            assert all(torch.equal(forward(fresh, step, x=latents(3, 16)), out) for step, out in enumerate(wide))


@ALL
def test_latents_of_another_size_within_a_run_are_computed(transformer, cache):
    if cache == "sea":  # it looks at the size itself
        return
    plain = forward(transformer, 3, x=latents(3, 16))
    with dit_accel.attach(transformer, CACHES[cache]):
        for step in range(3):
            forward(transformer, step)
        assert torch.equal(forward(transformer, 3, x=latents(3, 16)), plain)


@pytest.mark.parametrize("cache", [FirstBlockCacheConfig(threshold=0.0), mag(threshold=0.0, retention_ratio=0.0)])
def test_a_threshold_of_nought_computes_every_step(transformer, cache):
    plain = forward(transformer, 0)
    with dit_accel.attach(transformer, cache) as attachment:
        assert all(torch.equal(forward(transformer, step), plain) for step in range(STEPS))
        assert layers_run(attachment) == [3] * STEPS


def test_first_block_cache_computes_what_is_not_a_number(transformer):
    with dit_accel.attach(transformer, FirstBlockCacheConfig(**ALWAYS)) as attachment:
        for step, scale in enumerate((1.0, 1.0, float("nan"), 1.0, 1.0)):
            forward(transformer, step, x=latents() * scale)
        assert layers_run(attachment) == [3, 1, 3, 3, 1]  # a difference from what was no number is none either


def test_a_config_is_not_written_to_and_a_subclass_is_taken(transformer):
    @dataclasses.dataclass
    class Mine(FirstBlockCacheConfig):
        pass

    config, broadcast = Mine(threshold=0.3), pyramid(spatial_attention_block_skip_range=None)
    for given in (config, broadcast):
        before = dict(vars(given))
        with dit_accel.attach(transformer, given):
            assert transformer._cache_config is not given
        assert vars(given) == before
    with dit_accel.attach(transformer, config) as attachment:
        told = attachment.report().to_dict()
        assert told["methods"]["diffusers-cache"] == {"config": "Mine", "threshold": 0.3}


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
        assert "'mag_ratios'" not in str(report.to_dict())
        forward(transformer, 0)
        assert layers_run(attachment) == [3]  # of the run that began


def test_what_the_user_changes_meanwhile_stays_the_users(transformer):
    attachment = dit_accel.attach(transformer, FirstBlockCacheConfig(**ALWAYS))
    transformer.disable_cache()
    attachment.detach()
    attachment = dit_accel.attach(transformer, FirstBlockCacheConfig(**ALWAYS))
    transformer.disable_cache()
    transformer.enable_cache(mag())
    attachment.detach()
    assert isinstance(transformer._cache_config, MagCacheConfig)
    assert forward(transformer, 0).isfinite().all()
    transformer.disable_cache()


def test_a_cache_that_can_not_be_enabled_leaves_nothing():
    bria = BriaTransformer2DModel(**FLUX_KIN[0].config).eval()  # diffusers knows its first blocks, not its single ones
    before = attributes(bria)
    with pytest.raises(ConfigError, match=r"enable FirstBlockCacheConfig.*BriaTransformer2DModel"):
        dit_accel.attach(bria, FirstBlockCacheConfig())
    assert attributes(bria) == before
    assert dit_accel.attachment_of(bria) is None
    pipe = types.SimpleNamespace(components={"transformer": tiny_transformer(), "transformer_2": bria})
    before = attributes(pipe.components["transformer"])
    with pytest.raises(ConfigError, match="not registered"):
        dit_accel.attach(pipe, FirstBlockCacheConfig())
    assert attributes(pipe.components["transformer"]) == before


def test_one_cache_a_transformer(transformer):
    with pytest.raises(
        ConfigError,
        match="FirstBlockCacheConfig and MagCacheConfig",
    ):
        dit_accel.attach(transformer, FirstBlockCacheConfig(), mag())
    transformer.enable_cache(mag())
    with pytest.raises(
        ConfigError,
        match=r"FirstBlockCacheConfig.*MagCacheConfig.*pipe\.transformer\.disable_cache\(\)",
    ):
        dit_accel.attach(transformer, FirstBlockCacheConfig())
    assert transformer.is_cache_enabled
    transformer.disable_cache()
    transformer._is_cached, transformer._context_manager = True, object()  # as cache-dit 1.5 leaves them
    with pytest.raises(ConfigError, match=r"cache-dit.*cache_dit\.disable_cache\(pipe\)"):
        dit_accel.attach(transformer, FirstBlockCacheConfig())


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            FirstBlockCacheConfig(threshold=-0.1),
            r"FirstBlockCacheConfig\.threshold.*>= 0, got -0\.1",
        ),
        (FirstBlockCacheConfig(threshold=float("nan")), r"FirstBlockCacheConfig\.threshold.*>= 0, got nan"),
        (mag(threshold=-1.0), r"MagCacheConfig\.threshold.*>= 0, got -1\.0"),
        (taylor(cache_interval=0), r"TaylorSeerCacheConfig\.cache_interval.*>= 1, got 0"),
        (taylor(disable_cache_before_step=0), r"disable_cache_before_step.*>= 1, got 0"),
        (taylor(max_order=-1), r"max_order.*>= 0, got -1"),
        (
            pyramid(current_timestep_callback=None),
            r"PyramidAttentionBroadcastConfig\.current_timestep_callback",
        ),
        (FasterCacheConfig(), r"current_timestep_callback=lambda: pipe\.current_timestep"),
        (
            FasterCacheConfig(current_timestep_callback=int, tensor_format="BSC"),
            r"enable FasterCacheConfig.*Wan",
        ),
        (
            pyramid(spatial_attention_block_identifiers=("nowhere",)),
            r"PyramidAttentionBroadcastConfig.*no module.*WanTransformer3DModel",
        ),
        (
            TaylorSeerCacheConfig(),
            r"self-attention.*WanTransformer3DModel.*cache_identifiers=\['blocks\\\\\.\\\\d\+\\\\\.attn1'\]",
        ),
        (
            taylor(cache_identifiers=None, skip_predict_identifiers=[r"blocks\.\d"]),
            r"self-attention.*WanTransformer3DModel",
        ),
        (
            TextKVCacheConfig(),
            r"TextKVCacheConfig.*WanTransformer3DModel.*text keys",
        ),
    ],
)
def test_what_would_fail_or_do_nothing_is_refused(transformer, config, text):
    before = attributes(transformer)
    with pytest.raises(ConfigError, match=text):
        dit_accel.attach(transformer, config)
    assert attributes(transformer) == before


def test_the_identifiers_that_are_named_work(transformer):
    with pytest.raises(ConfigError) as refused:
        dit_accel.attach(transformer, TaylorSeerCacheConfig())
    named = eval(str(refused.value).partition("cache_identifiers=")[2].partition(", or")[0])
    with dit_accel.attach(transformer, taylor(cache_identifiers=named)) as attachment:
        assert "3 modules hooked" in str(attachment.report().section("diffusers-cache"))


def test_models_on_which_a_cache_is_wrong_are_named():
    vace = WAN[2].transformer(**WAN[2].config).eval()
    with pytest.raises(ConfigError, match=r"FirstBlockCacheConfig.*WanVACETransformer3DModel.*control branch"):
        dit_accel.attach(vace, FirstBlockCacheConfig())
    image = WAN[1].transformer(**WAN[1].config).eval()
    with pytest.raises(ConfigError, match=r"SeaCacheConfig.*WanTransformer3DModel.*raw_vision_callb"):
        dit_accel.attach(image, SeaCacheConfig())
    sd3 = SD3[0].transformer(**SD3[0].config).eval()
    with pytest.raises(ConfigError, match=r"SD3Transformer2DModel.*enable_cache"):
        dit_accel.attach(sd3, FirstBlockCacheConfig())
    experts = {"transformer": tiny_transformer(), "transformer_2": tiny_transformer(1)}
    pipe = types.SimpleNamespace(components=experts)
    with pytest.raises(ConfigError, match=r"transformer_2.*attach\(pipe\.transformer_2, MagCache"):
        dit_accel.attach(pipe, mag())
    assert not experts["transformer"].is_cache_enabled
    with dit_accel.attach(pipe, FirstBlockCacheConfig()):
        assert all(expert.is_cache_enabled for expert in experts.values())


def test_mag_cache_follows_the_run_it_was_made_for(transformer):
    with dit_accel.attach(transformer, mag()):
        with pytest.raises(
            ConfigError,
            match=r"MagCacheConfig\.num_inference_steps = 6.*9 steps",
        ):
            forward(transformer, 0, steps=9)
        forward(transformer, 0)
        with pytest.raises(ConfigError, match=r"MagCacheConfig.*scheduler.*twice"):
            forward(transformer, 0)


@pytest.mark.parametrize("config", [FirstBlockCacheConfig(**ALWAYS), mag(retention_ratio=0.0)])
def test_what_a_controlnet_adds_between_blocks_is_refused(config):
    flux = FluxTransformer2DModel(**FLUX[0].config).eval()
    torch.manual_seed(1)
    inputs = dict(FLUX[0].inputs(1))
    told = dict(step_index=0, num_inference_steps=STEPS)
    with dit_accel.attach(flux, config), torch.no_grad(), flux.cache_context("cond", **told):
        flux(**inputs, controlnet_block_samples=None)
        with pytest.raises(ConfigError, match=r"reuse.*controlnet_block_samples"):
            flux(**inputs, controlnet_block_samples=[torch.randn(1, 80, 32)])


def test_faster_cache_asks_for_two_halves(transformer):
    faster = FasterCacheConfig(current_timestep_callback=lambda: 500, attention_weight_callback=lambda module: 0.3)
    two = latents().repeat(2, 1, 1, 1, 1)
    with dit_accel.attach(transformer, faster), torch.no_grad():
        for x, branch in ((latents(), "cond_uncond"), (two, "cond")):
            with pytest.raises(ConfigError, match=rf"batched call.*'{branch}'.*\[\d, 12, 5"):
                forward(transformer, 0, branch, x)
    wrong = dataclasses.replace(faster, tensor_format="BFCHW")
    with (
        dit_accel.attach(transformer, wrong),
        pytest.raises(ConfigError, match=r"'BFCHW'.*latents.*\["),
    ):
        forward(transformer, 0, "cond_uncond", two)
    image = WAN[1].transformer(**WAN[1].config).eval()
    refused = pytest.raises(ConfigError, match=r"encoder_hidden_states_image.*branches")
    with dit_accel.attach(image, faster), torch.no_grad(), image.cache_context("cond_uncond"), refused:
        image(**WAN[1].inputs(2))


def test_faster_cache_without_guidance_needs_a_first_step_to_reuse(transformer):
    now = [500]
    distilled = FasterCacheConfig(
        current_timestep_callback=lambda: now[0], attention_weight_callback=lambda module: 0.3,
        is_guidance_distilled=True,
    )  # fmt: skip
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


def test_diffusers_still_has_the_defects_that_are_put_right_here(transformer):
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
    transformer.disable_cache()
    assert "forward" in transformer.blocks[0].__dict__
    transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    assert layers((0,), (1, "cond", latents() * float("nan"))) == 4
    with pytest.raises(ValueError, match="cache context"):
        untold(transformer, 0)
    transformer.disable_cache()
    transformer.enable_cache(mag(threshold=0.0, retention_ratio=0.0))
    assert layers((0,), (1,)) == 3
    transformer.disable_cache()
    transformer.enable_cache(pyramid())
    assert layers((0, "cond"), (0, "uncond")) == 6
    cond, uncond = (forward(tiny_transformer(), 0, branch) for branch in ("cond", "uncond"))
    transformer._reset_stateful_cache()
    assert torch.equal(forward(transformer, 0, "cond"), cond)
    assert not torch.allclose(forward(transformer, 0, "uncond"), uncond, atol=1e-3)
    transformer.disable_cache()
    HookRegistry.check_if_exists_or_initialize(transformer)
    transformer.enable_cache(TaylorSeerCacheConfig())
    assert layers(*[(step,) for step in range(8)]) == 24


@pytest.mark.parametrize(("hooked", "lacks"), [({"proj_out"}, "no blocks"), ({"blocks.0.attn1"}, "no proj_out")])
def test_the_lite_mode_of_taylorseer_says_what_it_did_not_find(transformer, hooked, lacks):
    config = TaylorSeerCacheConfig(use_lite_mode=True)
    with pytest.raises(ConfigError, match=lacks):
        check_hooked("TaylorSeerCacheConfig", config, transformer, adapter_for("WanTransformer3DModel"), hooked)
