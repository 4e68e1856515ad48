"""Which methods must be refused on which pipelines, read off what adapters and diffusers declare, never off a list."""

import fnmatch
from typing import Any

from diffusers.hooks._helpers import TransformerBlockRegistry
from matrix_methods import GUIDING, names_of
from matrix_situations import Trial

from dit_accel.adapters.adapter import Adapter
from dit_accel.adapters.block_lists import block_lists, blocks_of
from dit_accel.adapters.cross_attention import CrossAttention
from dit_accel.adapters.joined_text import JoinedText
from dit_accel.adapters.registry import adapter_for
from dit_accel.adapters.rope import changeable_axes, rope_of
from dit_accel.errors import ConfigError
from dit_accel.methods.base import Place
from dit_accel.methods.caches.native_limits import _WRONG
from dit_accel.methods.registry import handler_of

UNREADABLE = {"LTX2DFRPipeline": "those of no video"}
"""Pipeline class -> in words, why its tokens are laid out as no method can read them."""

MASKED = ("ChromaImg2ImgPipeline", "ChromaInpaintPipeline")
"""Pipeline classes that turn the text's mask into numbers, which attention methods can't follow (README)."""


def declared(trial: Trial) -> str | None:
    """Return, as a part of the error's text, why a method must be refused on a pipeline; None: it must run."""
    transformer = trial.transformer
    adapter = adapter_for(type(transformer).__name__)
    for name in names_of(trial.configs):
        if name in adapter.refused:
            return adapter.refused[name]
    places = frozenset[Place]().union(*(handler_of(config).places for config in trial.configs))
    if Place.BLOCKS in places and adapter.blocks == ():
        return adapter.name
    if Place.POSITIONS in places and (why := _no_positions(adapter, transformer)):
        return why
    thins = places & {Place.ATTENTION, Place.POSITIONS}
    if thins and (why := UNREADABLE.get(type(trial.pipe).__name__)):
        return why
    if thins and trial.method not in ("rope", "lite") and type(trial.pipe).__name__ in MASKED:
        return "sparse attention follows masks that hide keys"
    if trial.method == "dfa" and not _flows(trial.pipe.scheduler):
        return "reads the foreground off a flow model's prediction"
    if trial.method == "profilingcache" and not adapter.guidance.share_prefix:
        return "whose results it takes besides its streams"
    if trial.method == "teacache" and adapter.signal is None:
        return "does not say how to get it"
    if trial.method == "diffusers-cache":
        return _no_native(adapter, transformer, trial)
    return _not_guided(adapter, trial) if trial.method in GUIDING else None


def _flows(scheduler: Any) -> bool:
    return "FlowMatch" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas"))


def _no_positions(adapter: Adapter, transformer: Any) -> str | None:
    try:
        rope = rope_of(adapter.name, adapter.rope, transformer.config)
        return None if changeable_axes(adapter.name, rope, transformer.config) else adapter.name
    except ConfigError:
        return adapter.name


def _no_native(adapter: Adapter, transformer: Any, trial: Trial) -> str | None:
    kind, cls = "FirstBlockCacheConfig", type(transformer)
    if not hasattr(transformer, "enable_cache") or cls.__name__ in _WRONG[kind]:
        return kind
    known = TransformerBlockRegistry._registry
    blocks = [
        type(block)
        for listed in block_lists(adapter, transformer)
        for _, block in blocks_of(listed, adapter, transformer)
    ]
    if any(block not in known for block in blocks):
        return kind
    return "controlnet_block_samples" if "controlnet" in getattr(trial.pipe, "components", {}) else None


def _not_guided(adapter: Adapter, trial: Trial) -> str | None:
    names = [cls.__name__ for cls in type(trial.pipe).__mro__]
    texts = isinstance(adapter.cross_attention, CrossAttention) or isinstance(adapter.joined_text, JoinedText)
    if trial.method == "nag" and not texts:
        return "nag"
    own = getattr(adapter.guidance, "own", {})
    if why := next((own[name] for name in names if name in own), None):
        return why
    if trial.method == "nag":  # where the text is in the first forward alone, none can be laid beside it
        return "kv_cache" if type(trial.pipe).__name__ == "Flux2KleinKVPipeline" else None
    if getattr(trial.pipe, "guider", None) is not None:
        return None  # what is added goes behind the guider's result, whatever that does
    patterns = adapter.guidance.rescales
    return next((patterns[one] for one in patterns for name in names if fnmatch.fnmatch(name, one)), None)
