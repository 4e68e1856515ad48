"""Which ways of saving memory a run takes to stay below ``max_memory``, by an estimate that is checked at its end."""

import functools
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_accel.adapters import Family
from dit_accel.adapters.model_files import ModelFiles, read_config
from dit_accel.errors import ConfigError
from dit_accel.estimate.hardware import QUANTIZATIONS, find_hardware
from dit_accel.estimate.sizes import token_layout

from .devices import pick_device
from .memory import resident_now
from .options import RunOptions
from .weights import TRANSFORMERS, Options, empty_model, text_encoders

VAE_WAYS = {"tile": ("use_tiling", "enable_tiling"), "slice": ("use_slicing", "enable_slicing")}
"""Way of running an autoencoder in parts -> its attribute and its method."""

OFFLOADS = ("none", "text", "model", "group")
"""What may wait in main memory, from what costs the least time on."""

SHARE = 0.9
"""Share of ``max_memory`` that an estimate may take: allocators hold more than is in use."""

GIB = 2**30


def vae_ways(text: str | None) -> list[str]:
    """Return the ways that ``tile,slice`` names; `ConfigError` for one that there is not."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in VAE_WAYS:
            raise ConfigError(f"vae takes tile, slice or tile,slice, got {name!r}; take one of these")
    return names


def check_vae(request: RunOptions, files: ModelFiles) -> None:
    """Refuse tiles or slices of an autoencoder that has none."""
    for name in vae_ways(request.vae):
        if not files.vae or not hasattr(empty_model(files.vae), VAE_WAYS[name][0]):
            raise ConfigError(f"vae {name!r} is not for {files.name}, whose autoencoder has no such way; leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The bytes that a run needs on its device."""

    text: int  # of the text encoders' weights
    transformers: Sequence[int]  # of each transformer's weights
    vae: int  # of the autoencoder's weights
    denoising: int  # of a step's activations, about
    decoding: int  # of the autoencoder's activations, the whole output at once
    tiles: int | None  # the same in tiles; None: it has none

    def peak(self, offload: str, tiled: bool) -> int:
        """Return the most bytes that a run holds on its device."""
        decoding = self.tiles if tiled and self.tiles is not None else self.decoding
        most, weights = max(self.denoising, decoding), sum(self.transformers) + self.vae
        if offload == "model":
            return max(self.text, max(self.transformers) + self.denoising, self.vae + decoding)
        held = {"none": self.text + weights, "text": weights}
        return most + held.get(offload, max(self.text, *self.transformers) // 20)  # a few layers at a time


def fitted(
    request: Options, files: ModelFiles, family: Family | None, notes: list[str], warnings: list[str]
) -> tuple[Options, Family | None, list[str], list[str]]:
    """Return a request with what it needs to stay below its ``max_memory``, and further notes and warnings on that.

    What the user chose stays; on a CPU nothing waits elsewhere, so that only tiles are left.
    """
    if request.max_memory is None:
        return request, family, notes, warnings
    on_cpu, limit = pick_device(request.device).type == "cpu", find_hardware(request.max_memory).gib * GIB
    needs, base = needs_of(request, files, family, on_cpu=on_cpu), resident_now() if on_cpu else 0
    named = vae_ways(request.vae)
    tiles = [True] if "tile" in named else [False] if needs.tiles is None else [False, True]
    offloads = (request.offload,) if on_cpu or request.offload != "none" else OFFLOADS
    estimates = {(offload, tiled): base + needs.peak(offload, tiled) for offload in offloads for tiled in tiles}
    fits = [way for way, size in estimates.items() if size <= SHARE * limit]
    offload, tiled = fits[0] if fits else min(estimates, key=estimates.__getitem__)
    text = (
        f"max_memory {request.max_memory}: offload {offload}, the autoencoder {'in tiles' if tiled else 'whole'}, by "
        f"an estimate of {estimates[offload, tiled] / GIB:.3g} GiB"
    )
    vae = ["tile"] * tiled + [name for name in named if name != "tile"]
    request = replace(request, offload=offload, vae=",".join(vae) or None)
    if fits:
        return request, family, [*notes, text], warnings
    text += ", the least there is, which may not fit; take --quantize, or ask for a smaller output"
    return request, family, notes, [*warnings, text]


def memory_used(request: RunOptions, peak: Mapping[str, int]) -> tuple[str, bool] | None:
    """Return in words what a run took of its ``max_memory``, and whether it stayed below; None without one."""
    if request.max_memory is None:
        return None
    most, limit = peak.get("cuda", peak["host"]), find_hardware(request.max_memory).gib * GIB
    return f"the run took {most / GIB:.3g} GiB of max_memory {request.max_memory}", most <= limit


def needs_of(request: RunOptions, files: ModelFiles, family: Family | None, *, on_cpu: bool) -> Needs:
    """Estimate what a run needs, from the configs alone: weights by counting, the autoencoder by a run without data."""
    size = 4 if (request.dtype or ("float32" if on_cpu else "bfloat16")) == "float32" else 2
    present = [name for name in TRANSFORMERS if files.has(name)]
    configs = {name: read_config(files.name, f"{name}/config.json", request.revision) for name in present}
    whole, tiles = (0, None) if family is None or not files.vae else decoding_bytes(files.vae, request, family)
    return Needs(
        text=sum(_text_encoder(files, name, size, request) for name in text_encoders(files.index)),
        transformers=[_weights(empty_model(config), size, request.quantize) for config in configs.values()],
        vae=_weights(empty_model(files.vae), 4, None) if files.vae else 0,
        denoising=denoising_bytes(request, family, size), decoding=whole, tiles=tiles,
    )  # fmt: skip


def _weights(model: torch.nn.Module, size: int, quantize: str | None) -> int:
    """Return the bytes of a model's weights: matrices of linear layers as they are quantised, the rest of ``size``."""
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    rest = sum(weight.numel() for weight in model.parameters()) - linear
    return round(rest * size + linear * (QUANTIZATIONS[quantize][1] if quantize else size))


def _text_encoder(files: ModelFiles, name: str, size: int, request: RunOptions) -> int:
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.for_model(**read_config(files.name, f"{name}/config.json", request.revision))
    with init_empty_weights():
        model = getattr(transformers, files.index[name][1])(config)
    model.tie_weights()
    return _weights(model, size, request.quantize_text_encoder)


def sizes_of(request: RunOptions, family: Family) -> dict[str, int]:
    """Return a request's height, width and frames, a family's default where one is not set."""
    names = "height", "width", "num_frames"
    return {name: getattr(request, name) or getattr(family, name) or 1 for name in names}


def denoising_bytes(request: RunOptions, family: Family | None, size: int) -> int:
    """Estimate the activations of a block: its tokens, some copies in 32 bits, and the middle of its feed-forward."""
    if family is None:
        return 0
    tokens = token_layout(family, **sizes_of(request, family)).tokens
    return tokens * (family.heads * family.head_dim * (6 * size + 8) + 2 * family.ffn_dim * size)


def decoding_bytes(config: Mapping[str, Any], request: RunOptions, family: Family) -> tuple[int, int | None]:
    """Return the activations of decoding a request's output whole, and in tiles; None where there are none.

    ``config``: the autoencoder's.
    """
    height, width, frames = sizes_of(request, family).values()
    vae, text = empty_model(config), json.dumps(config, sort_keys=True)
    whole = _decoded(text, family.vae, frames, height, width)
    tile = getattr(vae, "tile_sample_min_height", None) or getattr(vae, "tile_sample_min_size", None)
    if tile is None or not hasattr(vae, "use_tiling"):
        return whole, None
    first = _decoded(text, family.vae, frames, min(tile, height), min(tile, width))
    return whole, min(whole, first + 3 * 4 * 3 * frames * height * width)  # the rows of tiles, blended, and the output


@functools.lru_cache(maxsize=32)
def _decoded(config: str, scales: tuple[int, int], frames: int, height: int, width: int) -> int:
    """Return the most bytes alive while an autoencoder of a config decodes without data."""
    vae, (step, scale) = empty_model(json.loads(config)).to("meta"), scales
    latents = [1, vae.config.get("latent_channels") or vae.config.get("z_dim") or 16, height // scale, width // scale]
    if step > 1:
        latents.insert(2, (frames - 1) // step + 1)
    with torch.no_grad(), Fused(), Alive() as alive:
        vae.decode(torch.empty(latents, device="meta"))
    return alive.most


class Fused(TorchFunctionMode):
    """Attention as cards compute it: without data torch would lay out all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like((*args, *(kwargs or {}).values())[0])
        return func(*args, **(kwargs or {}))


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make; ``most`` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = [*self._new((args, kwargs))]  # weights and inputs, and views of them later
        result = func(*args, **(kwargs or {}))
        del there
        for storage in self._new(result):
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _new(self, values: Any) -> Iterator[Any]:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor) and value.untyped_storage() not in self._seen:
                self._seen.add(value.untyped_storage())
                yield value.untyped_storage()

    def _add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)
