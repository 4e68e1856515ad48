"""Where diffusers' own caches fail or go wrong, as seen by running them: models, options and calls that are refused.

Seen with diffusers 0.42.1 on tiny models of every family that an adapter covers; a test runs them all again.
"""

import re
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from ...adapters.adapter import Adapter
from ...errors import ConfigError
from ..site import ForwardContext

FIRST_BLOCK, MAG, SEA = "FirstBlockCacheConfig", "MagCacheConfig", "SeaCacheConfig"
TAYLOR, TEXT = "TaylorSeerCacheConfig", "TextKVCacheConfig"
PYRAMID, FASTER = "PyramidAttentionBroadcastConfig", "FasterCacheConfig"
CONFIGS = (FASTER, FIRST_BLOCK, MAG, PYRAMID, SEA, TAYLOR, TEXT)
"""Names of the configs that diffusers' ``enable_cache`` takes."""

_ADDS = "its control branch adds to the stream between blocks, and a reused step would add that twice"
_NAMES = "it calls its blocks' streams by other names than this cache asks for"
_UNLIKE = "its first and its last block give different streams, which this cache takes for alike"
_WRONG = (
    ("WanVACETransformer3DModel", (FIRST_BLOCK, MAG, SEA), _ADDS),
    ("Kandinsky5Transformer3DModel", (FIRST_BLOCK,), _NAMES),
    ("Cosmos3OmniTransformer", (FIRST_BLOCK, MAG), _NAMES),
    ("Flux2Transformer2DModel", (FIRST_BLOCK, SEA), _UNLIKE),
    ("MotifVideoTransformer3DModel", (FIRST_BLOCK, MAG, SEA), _UNLIKE),
)
"""Transformer class, configs that would fail on it in the run, or quietly give wrong results or none, and why."""


def why_wrong(kind: str, model: str) -> str | None:
    """Return the reason why a cache does not work on a class of transformers, or None if it does."""
    return next((why for known, kinds, why in _WRONG if known == model and kind in kinds), None)


def check_config(kind: str, config: Any) -> None:
    """Raise `ConfigError` for an option with which a cache would fail in the run."""
    whole = {"cache_interval": 1, "disable_cache_before_step": 1, "max_order": 0} if kind == TAYLOR else {}
    for option, least in whole.items():
        value = getattr(config, option)
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{kind}.{option} must be a whole number >= {least}, got {value!r}")
    if kind in (FIRST_BLOCK, MAG) and not config.threshold > 0:
        raise ConfigError(
            f"{kind}.threshold must be > 0, got {config.threshold!r}, at which diffusers reuses steps all the same; "
            "leave the cache out to compute every step"
        )
    if kind in (FASTER, PYRAMID) and config.current_timestep_callback is None:
        raise ConfigError(
            f"{kind}.current_timestep_callback is not set, and diffusers can't tell the timestep without it; set "
            "current_timestep_callback=lambda: pipe.current_timestep"
        )


def check_model(kind: str, config: Any, name: str, transformer: nn.Module, further: bool) -> None:
    """Raise `ConfigError` for a model on which a cache fails, gives wrong results, or never reuses anything.

    ``further``: the config was given to another transformer of the pipeline already.
    """
    model = type(transformer).__name__
    if not hasattr(transformer, "enable_cache"):
        raise ConfigError(
            f"{kind} can't be attached to {model}: diffusers has no enable_cache for it; use a cache of dit-accel's own"
        )
    if why := why_wrong(kind, model):
        raise ConfigError(f"{kind} does not work on {model}: {why}; use another cache")
    if kind == MAG and further:
        raise ConfigError(
            f"{kind} counts the steps of each transformer from 0, so that {name} would follow the curve's first steps; "
            f"attach to each with its own steps and mag_ratios: attach(pipe.{name}, MagCacheConfig(...))"
        )
    if kind == SEA and config.raw_vision_callback is None and not _has_vision(transformer):
        raise ConfigError(
            f"{kind} knows no latents of {model} and would compute every step; set raw_vision_callback, a function of "
            "(module, args, kwargs) that returns one [C, F, H, W] tensor a row"
        )


def _has_vision(transformer: nn.Module) -> bool:
    """Tell whether diffusers itself knows the latents of a model for SeaCache."""
    options: Any = transformer.config
    if type(transformer).__name__ == "WanTransformer3DModel":
        return options.in_channels == options.out_channels
    return type(transformer).__name__ == "Cosmos3OmniTransformer"


def check_hooked(kind: str, config: Any, transformer: nn.Module, adapter: Adapter, hooked: Collection[str]) -> None:
    """Raise `ConfigError` if a cache was enabled and hooked no modules that could be reused."""
    model = type(transformer).__name__
    if kind == TAYLOR:
        attention = _attention_patterns(transformer, adapter)
        if config.use_lite_mode:
            _check_lite_mode(model, attention, hooked)
        else:
            _check_predicted(config, model, attention, hooked)
    elif kind == TEXT and not hooked:
        raise ConfigError(f"{kind} does nothing on {model}: diffusers knows the text keys of NucleusMoE-Image alone")
    elif kind in (PYRAMID, MAG) and not hooked:
        raise ConfigError(f"{kind} hooks no module of {model}; set its identifiers, or use another cache")


def _check_lite_mode(model: str, attention: list[str], hooked: Collection[str]) -> None:
    lacks = "no blocks that its pattern matches" if "proj_out" in hooked else "no proj_out to predict"
    if "proj_out" not in hooked or len(hooked) < 2:
        raise ConfigError(
            f"{TAYLOR}(use_lite_mode=True) finds in {model} {lacks}; leave it off and set cache_identifiers={attention}"
        )


def _check_predicted(config: Any, model: str, attention: list[str], hooked: Collection[str]) -> None:
    skipped = config.skip_predict_identifiers or ()
    predicted = [name for name in hooked if not _matches(skipped, name)]
    if config.cache_identifiers is None:  # diffusers' own match the whole name, and some match a side path alone
        predicted = [name for name in predicted if _matches(attention, name)]
    if not predicted:
        raise ConfigError(
            f"{TAYLOR} predicts no self-attention of {model}: its cache_identifiers match whole names, and none of "
            f"these; set cache_identifiers={attention}, or use_lite_mode=True"
        )


def _matches(patterns: Collection[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _attention_patterns(transformer: nn.Module, adapter: Adapter) -> list[str]:
    """Return regular expressions that match the attention modules an adapter names, and nothing more."""
    names = [name for name, _ in transformer.named_modules()]
    patterns = [re.escape(at).replace(r"\*", r"\d+") for at in (*adapter.self_attention, *adapter.side_attention)]
    return [pattern for pattern in patterns if any(_matches([pattern], name) for name in names)]


def check_call(
    kind: str, config: Any, context: ForwardContext, transformer: nn.Module, adapter: Adapter, ran: Collection[int]
) -> None:
    """Raise `ConfigError` for a forward in which a cache would go wrong without a word.

    ``ran``: the steps at which its branch ran before.
    """
    control = [name for name, value in context.inputs.items() if "controlnet" in name and _holds(value)]
    if control and kind in (FIRST_BLOCK, MAG, SEA):
        raise ConfigError(
            f"{kind} can't reuse a step with {control[0]}, which the model adds between its blocks: a reused step "
            "would add it twice; use a cache of whole forwards"
        )
    if context.beside is not None and context.step_index > 0 and not ran:
        raise ConfigError(
            f"{kind} begins a state of its own for {context.branch!r} in step {context.step_index}, after "
            f"{context.beside!r} reused some, so that guidance would add what the cache is off by; let it guide from "
            "the first step on (start = 0), or use one of dit-accel's own caches"
        )
    if kind == MAG:
        _check_mag(config, context, ran)
    if kind == SEA:
        _check_sea(context)
    if kind == FASTER and config.is_guidance_distilled:
        _check_faster_start(config, first=not ran)
    elif kind == FASTER:
        _check_faster(config, context, transformer, adapter)


def _check_mag(config: Any, context: ForwardContext, ran: Collection[int]) -> None:
    if context.num_inference_steps not in (None, config.num_inference_steps):
        raise ConfigError(
            f"MagCacheConfig.num_inference_steps = {config.num_inference_steps}, but the run has "
            f"{context.num_inference_steps} steps; set it to {context.num_inference_steps}, with mag_ratios for these"
        )
    if context.step_index in ran:
        raise ConfigError(
            "MagCacheConfig counts forwards as steps, and this scheduler runs the model twice a step; use another "
            "scheduler or another cache"
        )


def _check_sea(context: ForwardContext) -> None:
    sigma, steps = context.share_of_noise, context.num_inference_steps
    if steps is None or sigma is None or not 0 <= sigma <= 1:
        raise ConfigError(
            f"SeaCacheConfig needs the step's sigma in [0, 1] and the number of steps, and found sigma = "
            f"{sigma}, steps = {steps}; use a flow-matching scheduler, or tell them by "
            "transformer.cache_context(name, step_index=..., sigma=..., num_inference_steps=...)"
        )


def _holds(value: Any) -> bool:
    return isinstance(value, (Tensor, list, tuple)) and bool(len(value))


def _check_faster_start(config: Any, first: bool) -> None:
    now, (low, high) = config.current_timestep_callback(), config.spatial_attention_timestep_skip_range
    if first and low < now < high:
        raise ConfigError(
            f"FasterCacheConfig has nothing to reuse in the first step, at timestep {now}: end "
            f"spatial_attention_timestep_skip_range = {(low, high)} below that"
        )


def _check_faster(config: Any, context: ForwardContext, transformer: Any, adapter: Adapter) -> None:
    """Raise `ConfigError` for a call in which FasterCache would not find two halves, or takes an axis for another."""
    latents, layout = context.inputs[adapter.latents], config.tensor_format
    shape = list(getattr(latents, "shape", [type(latents).__name__]))
    channels = getattr(transformer.config, "in_channels", None)
    if len(shape) != len(layout) or shape[layout.index("C")] != channels:
        raise ConfigError(
            f"FasterCacheConfig.tensor_format = {layout!r} is not how the latents lie: {shape}; set the format they "
            "have (BCFHW, BFCHW or BCHW), or use another cache"
        )
    if len(latents) % 2 or context.branch.split("/")[0] in ("cond", "uncond", "call 1"):
        raise ConfigError(
            "FasterCacheConfig needs guidance in one batched call, unconditional rows first, and "
            f"{context.branch!r} is a call of {shape}; set is_guidance_distilled=True, or use another cache"
        )
    split = config._unconditional_conditional_input_kwargs_identifiers
    whole = [
        name
        for name, value in context.inputs.items()
        if name not in split and isinstance(value, Tensor) and value.ndim and len(value) == len(latents)
    ]
    if whole:
        raise ConfigError(
            f"FasterCacheConfig would not split {', '.join(whole)} between the branches; add them to "
            "_unconditional_conditional_input_kwargs_identifiers, or use another cache"
        )
