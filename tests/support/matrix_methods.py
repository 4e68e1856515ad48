"""One setting of every method that acts in a short run of a tiny model: what the matrix of pipelines attaches."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig

import dit_accel as d
from dit_accel.methods.registry import handler_of

STEPS = 5
"""Denoising steps of a run; enough for a cache that skips every other step behind two computed ones."""

_SPARSE: Mapping[str, Any] = dict(block_size=16, dense_steps=1, dense_last_steps=0, dense_layers=0)
_CACHE: Mapping[str, Any] = dict(warmup_steps=1, last_steps=0)
_LARGER: Mapping[str, Any] = dict(trained_height=2, trained_width=2)


def _negative_text(call: Mapping[str, Any]) -> torch.Tensor:
    """Embeddings of a negative text, as many tokens as the prompt's and as wide."""
    size = (6, 16)
    for name in ("prompt_embeds", "prompt_embeds_qwen", "prompt_embeds_t5", "qwen_prompt_embeds"):
        prompt = call.get(name)
        while isinstance(prompt, list):
            prompt = prompt[0]
        if isinstance(prompt, torch.Tensor):
            size = prompt.shape[-2:]
            break
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(9))


def _of(*configs: Any) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    return lambda call: configs


METHODS: dict[str, Callable[[Mapping[str, Any]], tuple[Any, ...]]] = {
    "radial": _of(d.RadialAttention(decay_factor=0.2, near="half", sink=False, **_SPARSE)),
    "lite": _of(d.LiteAttention(target_density=0.5, dense_steps=1, block_size=16)),
    "sparsed": _of(d.SparseD(density=0.5, **_SPARSE)),
    "delta": _of(d.DeltaAttention(stride=8), d.SparseD(density=0.5, **_SPARSE)),
    "sol": _of(d.SolAttention(**_SPARSE)),
    "dfa": _of(d.DFA()),
    "ultravico": _of(d.UltraViCo(trained_frames=2, alpha=0.5, beta=0.2, period=3, gamma=0.5)),
    "lvsa": _of(d.LVSA(block_size=16, trained_frames=2, window=0)),
    "rope": _of(d.RoPE(kind="pi", trained_frames=2, **_LARGER)),
    "ultraimage": _of(d.UltraImage(correct=False, focus_max=2.0, rows=16, **_LARGER)),
    "staticcache": _of(d.StaticCache(every=2, predictor="taylor", **_CACHE)),
    "easycache": _of(d.EasyCache(threshold=50.0, **_CACHE)),
    "teacache": _of(d.TeaCache(threshold=1e9, polynomial=(1.0, 0.0), polynomial_2=(1.0, 0.0), **_CACHE)),
    "magcache": _of(d.MagCache(threshold=1e9, ratios=(1.0,) * STEPS, **_CACHE)),
    "seacache": _of(d.SeaCache(threshold=1e9, **_CACHE)),
    "firstblockcache": _of(d.FirstBlockCache(threshold=1e9, **_CACHE)),
    "dbcache": _of(d.DBCache(threshold=1e9, first_blocks=1, last_blocks=0, **_CACHE)),
    "dbprune": _of(d.DBPrune(threshold=1e9, **_CACHE)),
    "profilingcache": _of(d.ProfilingCache(blocks="1", every=2, **_CACHE)),
    "diffusers-cache": _of(FirstBlockCacheConfig(threshold=1e9)),
    "nag": lambda call: (d.NAG(scale=4.0, alpha=0.5, negative_embeds=_negative_text(call)),),
    "pag": _of(d.PAG(layers="L1", scale=2.0)),
    "softpag": _of(d.SoftPAG(heads="L1H0", u=0.7, scale=2.0)),
    "seg": _of(d.SEG(layers="L1", sigma=1.0, scale=2.0)),
    "slg": _of(d.SLG(layers="L1", scale=2.0, start=0.0, stop=1.0)),
}
"""Name of a registered method -> a call of a pipeline -> what is attached."""

GUIDING = ("nag", "pag", "softpag", "seg", "slg")
"""Methods that must know which rows of a forward hold the prompt."""


def names_of(configs: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the registered names of some configs."""
    return tuple(handler_of(config).config_type.name for config in configs)
