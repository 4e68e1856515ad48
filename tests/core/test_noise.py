"""The noise level: which one a scheduler tells, what it is on Mochi, and who is refused where it is not told."""

import functools
from types import SimpleNamespace

import diffusers
import pytest
import torch
from cache_calls import ADAPTER
from diffusers.hooks import SeaCacheConfig
from tiny_stock import stock_pipeline

import dit_accel
from dit_accel import DFA, ConfigError, EasyCache, SeaCache, SolAttention, StaticCache, UltraImage
from dit_accel.adapters.installed import adapters
from dit_accel.adapters.noise import listed_level, noise_of
from dit_accel.methods.base import Model
from dit_accel.methods.caches.native import DiffusersCache
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.noise import require_noise
from dit_accel.rules.foreground import predicted

FLOWS = "FlowMatchEuler FlowMatchHeun FlowMapEuler FlowMatchLCM MiniMaxH3 LTXEulerAncestralRF"
BETAS = "DEISMultistep DPMSolverMultistep DPMSolverSinglestep UniPCMultistep SASolver"
EXPLODING = "Euler EulerAncestral Heun EDMEuler KDPM2 KDPM2Ancestral EDMDPMSolverMultistep LMS"
UNTOLD = "DDIM DDPM PNDM CogVideoXDDIM CogVideoXDPM"
FLOW_SIGMAS = dict(use_flow_sigmas=True, prediction_type="flow_prediction")


@pytest.mark.parametrize(
    ("name", "options", "noise"),
    [
        (name, options, noise)
        for names, options, noise in (
            (FLOWS, {}, "flow"), (BETAS, FLOW_SIGMAS, "flow"), (BETAS, {}, "exploding"), (EXPLODING, {}, "exploding"),
            (UNTOLD, {}, "none"),
        )
        for name in names.split()
    ],
)  # fmt: skip
def test_what_a_scheduler_tells_is_known_before_a_run_and_true_in_it(name, options, noise):
    kinds = [getattr(diffusers, f"{name}{end}Scheduler", None) for end in ("", "Discrete")]
    scheduler = next(filter(None, kinds))(**options)
    assert noise_of(scheduler) == noise
    scheduler.set_timesteps(4)
    assert noise_of(scheduler) == noise
    levels = [listed_level(scheduler, index) for index in range(3)]
    if noise == "none":
        assert levels == [None] * 3
    else:
        assert levels[0] > levels[2]
        assert (max(levels) > 1) == (noise == "exploding")


def test_mochis_scheduler_lists_what_is_clean_and_its_model_predicts_toward_it():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(4)
    level, step = listed_level(scheduler, 1), scheduler.timesteps[0]
    clean, noise = torch.randn(2, 1, 7, 5, 6, 8)
    x, toward = level * noise + (1 - level) * clean, clean - noise
    scheduler.step(toward, step, noise)
    moved = scheduler.step(toward, scheduler.timesteps[1], x).prev_sample
    after = listed_level(scheduler, 2)
    torch.testing.assert_close(moved, after * noise + (1 - after) * clean)
    torch.testing.assert_close(
        predicted(x, -toward, level, (5, 3, 4)), predicted(clean, clean, 0.0, (5, 3, 4)), rtol=1e-4, atol=1e-5
    )
    assert adapters()["mochi"].toward_clean


NEEDING = {
    "seacache": (SeaCache(), {"flow", "exploding"}),
    "SeaCacheConfig": (DiffusersCache(config=SeaCacheConfig()), {"flow", "exploding"}),
    "dfa": (DFA(), {"flow"}),
    "ultraimage.guided": (UltraImage(guided=True, trained_height=2, trained_width=2), {"flow"}),
    "easycache.predictor = 'corrected'": (EasyCache(predictor="corrected"), {"flow", "exploding"}),
    "sol.dense_above_sigma = 0.5": (SolAttention(dense_above_sigma=0.5), {"flow", "exploding"}),
    "staticcache.below_sigma = 0.03": (StaticCache(below_sigma=0.03), {"flow", "exploding"}),
    "nothing": (EasyCache(), {"flow", "exploding", "none"}),
    "no foreground": (DFA(share=0), {"flow", "exploding", "none"}),
}
SCHEDULERS = {
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    "exploding": diffusers.EulerDiscreteScheduler(),
    "none": diffusers.CogVideoXDDIMScheduler(),
}


@pytest.mark.parametrize("asks", NEEDING)
@pytest.mark.parametrize("noise", SCHEDULERS)
def test_what_needs_a_noise_level_is_refused_by_the_schedulers_name(asks, noise):
    config, takes = NEEDING[asks]
    model = Model(adapter=ADAPTER, family=None, heads=2, layers=2, config={}, scheduler=SCHEDULERS[noise])
    require = functools.partial(require_noise, [SimpleNamespace(settings=config)], model.noises, model.noise_source)
    if noise in takes:
        require()
    else:
        with pytest.raises(ConfigError, match=rf"^{asks}.*noise level.*{type(SCHEDULERS[noise]).__name__}.*; "):
            require()


def test_a_family_without_a_pipeline_is_judged_by_the_scheduler_it_is_released_with():
    released = adapters()
    for name, refused in (("cogvideox", "seacache"), ("allegro", "dfa"), ("hunyuan-dit", "seacache")):
        config = {"seacache": SeaCache(), "dfa": DFA()}[refused]
        model = Model(adapter=released[name], family=None, heads=2, layers=2)
        with pytest.raises(ConfigError, match=rf"^{refused}.*{name}.*; "):
            make_handlers([config], model)
    alone = Model(adapter=released["cogvideox"], family=None, heads=2, layers=2, config={})
    make_handlers([SeaCache()], alone)  # a loop of one's own may state it


def test_a_scheduler_that_replaces_another_after_attach_is_refused_before_any_work():
    pipe, call = stock_pipeline("PixArtSigmaPipeline")
    ran = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with dit_accel.attach(pipe, SeaCache()):
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        with pytest.raises(ConfigError, match=r"^seacache.*DDIMScheduler.*easycache"):
            pipe(**call)
        assert not ran
        pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
        pipe(**call)
        assert ran
