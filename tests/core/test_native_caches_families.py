"""diffusers' own caches on tiny models of every family: what works reuses rightly, what does not is refused at once."""

import re

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from tiny_models import MODELS

import dit_accel
from dit_accel import ConfigError
from dit_accel.adapters.installed import adapter_for
from dit_accel.methods.caches.native_limits import CONFIGS
from dit_accel.testing.tiny_models import STEPS, Case

FACTORS = dict(taylor_factors_dtype=torch.float32, disable_cache_before_step=2, cache_interval=3)
CACHES = {
    "first block": FirstBlockCacheConfig(threshold=1e9),
    "mag": MagCacheConfig(threshold=10.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    "taylor": TaylorSeerCacheConfig(**FACTORS),
    "taylor lite": TaylorSeerCacheConfig(**FACTORS, use_lite_mode=True),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "faster": FasterCacheConfig(
        current_timestep_callback=lambda: 500, alpha_low_frequency=1.0, alpha_high_frequency=1.0,
        attention_weight_callback=lambda module: 0.0,
    ),
    "sea": SeaCacheConfig(threshold=1e9),
    "sea told": SeaCacheConfig(threshold=1e9, raw_vision_callback=lambda *call: [torch.ones(4, 5, 8, 8)]),
    "text": TextKVCacheConfig(),
}  # fmt: skip
assert {type(config).__name__ for config in CACHES.values()} == set(CONFIGS)

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

FEW = ("wan", "sd3", "flux-kin", "cosmos-3")
CASES = [
    pytest.param(
        family,
        number,
        marks=[] if family in FEW else [pytest.mark.slow] if number == 0 else [pytest.mark.slow, pytest.mark.rare],
        id=f"{family} {number}",
    )
    for family, models in MODELS.items()
    for number in range(len(models))
]

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


def attached_runs(case, config):
    """Run three steps of two branches on the same inputs; return the largest error, and layers that ran, of all."""
    calls = [(case.inputs(2), "cond_uncond")] if isinstance(config, FasterCacheConfig) else []
    calls = calls or [(case.inputs(1), "cond"), (case.inputs(2), "uncond")]
    plain = [case.run(inputs, branch=branch) for inputs, branch in calls]
    error = 0.0
    with dit_accel.attach(case.transformer, config) as attachment:
        for step in range(STEPS):
            for (inputs, branch), expected in zip(calls, plain, strict=True):
                told = dict(step_index=step, num_inference_steps=STEPS, sigma=1 - step / STEPS)
                with torch.no_grad(), case.transformer.cache_context(branch, **told):
                    out = case.transformer(**inputs, return_dict=False)
                out = out if isinstance(out, torch.Tensor) else out[0]
                out = out if isinstance(out, torch.Tensor) else out[-1]  # a list where a forward takes one row
                error = max(error, float((out - expected).abs().max() / expected.abs().max()))
        counted = attachment.report().section("diffusers-cache").data["calls"]
    return error, sum(call["layers_run"] for call in counted), sum(call["layers"] for call in counted)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("family", "number"), CASES)
def test_frozen_inputs_give_what_was_computed_or_the_model_is_refused(family, number, cache):
    """What a cache reuses on inputs that stay is what the model computes on them."""
    model = MODELS[family][number]
    case = Case(adapter_for(model.transformer.__name__), model)
    before = {name: set(module.__dict__) for name, module in case.transformer.named_modules()}
    if not hasattr(case.transformer, "enable_cache"):
        with pytest.raises(ConfigError, match=rf"{model.transformer.__name__}.*enable_cache"):
            dit_accel.attach(case.transformer, CACHES[cache])
        return
    named, refusal = f"{family} {number}", ""
    try:
        error, ran, of = attached_runs(case, CACHES[cache])
    except ConfigError as raised:
        refusal = str(raised)
    works = named in WORKS[cache].split(", ") if cache in WORKS else named not in FAILS[cache].split(", ")
    assert works == (not refusal), refusal
    if refusal:
        assert re.search(REFUSED[cache], refusal), refusal
    else:
        assert error < 1e-3
        assert ran == of if cache == "text" else 0 < ran < of
    case.transformer.__dict__.pop("_diffusers_hook", None)  # a context makes one, cached or not
    before[""].discard("_diffusers_hook")
    assert {name: set(module.__dict__) for name, module in case.transformer.named_modules()} == before
