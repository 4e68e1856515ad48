"""Which of diffusers' pipelines there are, what they can't do, as it was found by running them, and what is refused.

Refusals are read off what adapters and diffusers declare. `python tests/support/matrix_limits.py [pattern]` writes
tests/support/matrix_limits.json, from which the matrix knows its cases without making a pipeline; a test finds all of
it again.
"""

import importlib
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers.modular_pipelines
import diffusers.pipelines
from diffusers import DiffusionPipeline
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.modular_pipelines import ModularPipeline
from matrix_methods import GUIDING, METHODS, names_of
from matrix_situations import SITUATIONS, Plain, Trial, class_names, plain_of, rescaled
from tiny_parts import blocks_of as modular_blocks
from tiny_stock import PIPELINES

from dit_accel.adapters import installed
from dit_accel.adapters.adapter import Adapter
from dit_accel.adapters.block_lists import block_lists, blocks_of
from dit_accel.adapters.cross_attention import CrossAttention
from dit_accel.adapters.installed import adapter_for
from dit_accel.adapters.joined_text import JoinedText
from dit_accel.adapters.noise import noise_of
from dit_accel.adapters.rotary import changeable_axes, rope_of
from dit_accel.errors import ConfigError
from dit_accel.methods.base import Place
from dit_accel.methods.caches.native_limits import why_wrong
from dit_accel.methods.registry import handler_of

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Limits:
    """What a pipeline takes no part in.

    Attributes:
        cannot: situation -> why the class can't be brought into it, whatever is attached.
        refused: methods that the adapter or diffusers declares to make no sense on it.
    """

    cannot: dict[str, str]
    refused: tuple[str, ...]


def _why_not(plain: Plain, situation: str) -> str | None:
    try:
        plain_of(situation, plain)
    except Exception as error:
        text = re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", " ".join(str(error).split()))
        return f"{type(error).__name__}: {text[:90]}"
    return None


def found_of(plain: Plain) -> Limits:
    """Run and read a pipeline."""
    plain.rows([0], [0])
    cannot = {one: why for one in SITUATIONS if (why := _why_not(plain, one)) is not None}
    return Limits(cannot, refused_of(plain))


def refused_of(plain: Plain) -> tuple[str, ...]:
    """Read which methods must be refused on a pipeline."""
    return tuple(method for method in METHODS if declared(Trial(plain, method)) is not None)


@cache
def limits() -> dict[str, Limits]:
    """Return pipeline -> its limits, as they were found last."""
    return {name: Limits(one["cannot"], tuple(one["refused"])) for name, one in json.loads(FILE.read_text()).items()}


UNREADABLE = {"LTX2DFRPipeline": "which of its tokens are the video's"}
"""Pipeline class -> in words, why its tokens are laid out as no method can read them."""

MASKED = ("ChromaImg2ImgPipeline", "ChromaInpaintPipeline")
"""Pipeline classes that turn the text's mask into numbers, which attention methods can't follow (README)."""

IMAGES = ("Cosmos2TextToImagePipeline", "Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline", "AnimaModularPipeline")
"""Pipeline classes that make one frame with a video transformer."""

STILL = {"dfa": "tells the foreground by what moves", "radial": "needs at least 2 latent frames"}
"""Method -> in words, why it is refused on one frame."""

COUNTED = ("dfa", "magcache")
"""Methods that, as the matrix sets them, need the number of steps, which only a scheduler tells."""


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
    names = class_names(trial.pipe)
    if thins and (why := next((UNREADABLE[name] for name in names if name in UNREADABLE), None)):
        return "how many tokens this forward has along each axis" if Place.POSITIONS in places else why
    if thins and trial.method not in ("rope", "lite", *GUIDING) and names & set(MASKED):
        return "sparse attention follows masks that hide keys"
    if trial.method == "dfa" and "scheduler" in trial.pipe.components and not _flows(trial.pipe):
        return "reads the foreground off a flow model's prediction"
    if trial.method in STILL and names & set(IMAGES):
        return STILL[trial.method]
    if trial.method in COUNTED and "scheduler" not in trial.pipe.components:
        return "needs the number of steps"
    if trial.method == "progressive" and not _pools(adapter, trial, names):
        return "progressive can't halve"
    if trial.method in ("seacache", "progressive") and not hasattr(trial.pipe.components.get("scheduler"), "sigmas"):
        return "needs the noise level"
    if trial.method == "profilingcache" and not adapter.guidance.share_prefix:
        return "whose results it takes besides its streams"
    if trial.method == "teacache" and adapter.signal is None:
        return "does not say how to get it"
    if trial.method == "diffusers-cache":
        return _no_native(adapter, transformer, trial)
    if trial.method == "cfgcache":
        alone, own = names & {*adapter.guidance.alone} and not hasattr(trial.pipe, "guider"), adapter.guidance.own
        last = adapter.guidance.uncond_tokens == "last" and "Turbo" not in type(trial.pipe).__name__
        why = "is unconditional" if alone else "as many tokens" if last else None
        return next((own[one] for one in names if one in own), why)
    return _not_guided(adapter, trial) if trial.method in GUIDING else None


def _pools(adapter: Adapter, trial: Trial, names: set[str]) -> bool:
    config = trial.transformer.config
    taken, given = config.get("in_channels"), config.get("out_channels")
    words = ("ControlNet", "VACE", "Vace", "Kontext", "Edit", "Layered")
    beside = any(word in name for name in names for word in words)
    each = getattr(trial.pipe, "config", {}).get("expand_timesteps")  # Wan 2.2 5B: a timestep for each token
    return bool(adapter.flow) and not each and not beside and (not given or taken in (given, 4 * given))


def _flows(pipe: Any) -> bool:
    return noise_of(pipe.scheduler) == "flow" and getattr(pipe, "sigma_max", 1.0) <= 1  # Cosmos 2 hands on EDM's sigmas


def _no_positions(adapter: Adapter, transformer: Any) -> str | None:
    try:
        rope = rope_of(adapter.name, adapter.rope, transformer.config)
        return None if changeable_axes(adapter.name, rope, transformer.config) else adapter.name
    except ConfigError:
        return adapter.name


def _no_native(adapter: Adapter, transformer: Any, trial: Trial) -> str | None:
    kind, cls = "FirstBlockCacheConfig", type(transformer)
    if not hasattr(transformer, "enable_cache") or why_wrong(kind, cls.__name__):
        return kind
    known = TransformerBlockRegistry._registry
    blocks = [
        type(block)
        for listed in block_lists(adapter, transformer)
        for _, block in blocks_of(listed, adapter, transformer)
    ]
    if any(block not in known for block in blocks):
        return kind
    return "controlnet_block_samples" if trial.pipe.components.get("controlnet") is not None else None


def _not_guided(adapter: Adapter, trial: Trial) -> str | None:
    names = class_names(trial.pipe)
    texts = isinstance(adapter.cross_attention, CrossAttention) or isinstance(adapter.joined_text, JoinedText)
    if trial.method == "nag" and not texts:
        return "nag"
    own = getattr(adapter.guidance, "own", {})
    if why := next((own[name] for name in names if name in own), None):
        return why
    if trial.method == "nag":  # where the text is in the first forward alone, none can be laid beside it
        return "kv_cache" if "Flux2KleinKVPipeline" in names else None
    if getattr(trial.pipe, "guider", None) is not None:
        return None  # what is added goes behind the guider's result, whatever that does
    return rescaled(trial)


@cache
def covered() -> frozenset[str]:
    """Names of the transformer classes that an adapter covers."""
    return frozenset(name for adapter in installed.adapters().values() for name in adapter.transformers)


def _defined(package: Any, base: type) -> Iterator[type]:
    """Classes of a kind that a package's modules define; modules that need what is not installed are left out."""
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            module = importlib.import_module(found.name)
        except ImportError:
            continue
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, base) and cls.__module__ == module.__name__:
                yield cls


def _transformers(cls: type) -> set[str]:
    """Names of the covered transformers that a pipeline's constructor is annotated with."""
    asked = inspect.signature(cls.__init__).parameters.values()
    return {name for one in asked for name in re.findall(r"\w+", str(one.annotation)) if name in covered()}


def _modular_transformers(cls: Any) -> set[str]:
    """The same of the components that a modular pipeline's own blocks expect."""
    if cls.default_blocks_name is None:
        return set()
    hints = (component.type_hint for component in modular_blocks(cls).expected_components)
    return {name for hint in hints if hint is not None if (name := hint.__name__) in covered()}


def pipeline_classes() -> dict[str, set[str]]:
    """Return pipeline class -> the covered transformers that it builds on."""
    whole = {cls.__name__: _transformers(cls) for cls in _defined(diffusers.pipelines, DiffusionPipeline)}
    blocks = {
        cls.__name__: _modular_transformers(cls) for cls in _defined(diffusers.modular_pipelines, ModularPipeline)
    }
    return {name: found for name, found in {**whole, **blocks}.items() if found}


def write(pattern: str) -> None:
    """Find the limits of the pipelines whose names hold a pattern, and write them down."""
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in PIPELINES:
        if re.search(pattern, name):
            found[name] = asdict(found_of(Plain(name)))
    lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in PIPELINES if name in found]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write(sys.argv[1] if sys.argv[1:] else "")
