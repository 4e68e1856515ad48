"""One setting of every method that acts in a short run of a tiny model: what the matrix of pipelines attaches."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig
from method_table import TABLE

import dit_accel as d
from dit_accel.methods.registry import handler_of
from dit_accel.testing.method_cases import configs_of

STEPS = 5
"""Denoising steps of a run; enough for a cache that skips every other step behind two computed ones."""

LATER: Mapping[str, int] = dict(dense_steps=1, warmup_steps=1)
"""What a method waits for here that acts in every step of the table's."""


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


def _row(name: str) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """Return what the table of methods has active, from the second step on."""
    configs = configs_of(TABLE[name].active)
    waiting = [{option: LATER[option] for option in LATER if getattr(config, option, None) == 0} for config in configs]
    return _of(*(replace(config, **options) for config, options in zip(configs, waiting, strict=True)))


METHODS: dict[str, Callable[[Mapping[str, Any]], tuple[Any, ...]]] = {
    "radial": _row("radial"),
    "lite": _of(d.LiteAttention(target_density=0.5, dense_steps=1, block_size=16)),
    **{name: _row(name) for name in ("sparsed", "delta", "sol")},
    "dfa": _of(d.DFA()),
    "ultravico": _of(d.UltraViCo(trained_frames=2, alpha=0.5, beta=0.2, period=3, gamma=0.5)),
    **{name: _row(name) for name in ("lvsa", "rope", "ultraimage")},
    "staticcache": _row("staticcache, taylor"),
    "easycache": _of(d.EasyCache(threshold=50.0, warmup_steps=1, last_steps=0)),
    "teacache": _row("teacache"),
    "magcache": _of(d.MagCache(threshold=1e9, ratios=(1.0,) * STEPS, warmup_steps=1, last_steps=0)),
    **{name: _row(name) for name in ("seacache", "firstblockcache", "dbcache")},
    "dbprune": _of(d.DBPrune(threshold=1e9, warmup_steps=1, last_steps=0)),
    "profilingcache": _row("profilingcache"),
    "diffusers-cache": _of(FirstBlockCacheConfig(threshold=1e9)),
    "nag": lambda call: (replace(TABLE["nag"].config, negative_embeds=_negative_text(call)),),
    **{name: _row(name) for name in ("pag", "softpag", "seg", "slg", "cfgcache")},
}
"""Name of a registered method -> a call of a pipeline -> what is attached."""

GUIDING = ("nag", "pag", "softpag", "seg", "slg")
"""Methods that must know which rows of a forward hold the prompt."""


def names_of(configs: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the registered names of some configs."""
    return tuple(handler_of(config).config_type.name for config in configs)
