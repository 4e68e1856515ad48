"""Which ways of saving memory a run takes to stay below ``max_memory``, by an estimate that is checked at its end."""

import contextlib
import functools
import json
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dit_accel.adapters import Family
from dit_accel.adapters.model_files import ModelFiles, read_config
from dit_accel.errors import ConfigError
from dit_accel.estimate.hardware import QUANTIZATIONS, find_hardware
from dit_accel.estimate.sizes import token_layout

from .memory import resident_now
from .weights import TRANSFORMERS, empty_model, text_encoders

if TYPE_CHECKING:
    from .request import Request

VAE_WAYS = {"tile": "enable_tiling", "slice": "enable_slicing"}
"""Way of running an autoencoder in parts -> its method."""

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


def check_memory(request: "Request") -> None:
    """Refuse a ``max_memory`` that is no size, and ways of an autoencoder that there are not."""
    vae_ways(request.vae)
    if request.max_memory is not None:
        find_hardware(request.max_memory)


def check_vae(request: "Request", files: ModelFiles) -> None:
    """Refuse tiles or slices of an autoencoder that has none."""
    for name in vae_ways(request.vae):
        if not files.vae or not hasattr(empty_model(files.vae), {"tile": "use_tiling", "slice": "use_slicing"}[name]):
            raise ConfigError(
                f"vae {name!r} was requested, and the autoencoder of {files.name} has no such way; leave it out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The bytes that a run needs."""

    text: int  # of the text encoders' weights
    transformers: tuple[int, ...]  # of each transformer's weights
    vae: int  # of the autoencoder's weights
    denoising: int  # of a step's activations, about
    decoding: int  # of the autoencoder's activations, decoding the whole output
    tiles: int | None  # the same in tiles; None: it has none

    def peak(self, offload: str, tiled: bool) -> int:
        """Return the most bytes that a run holds on its device."""
        decoding = self.tiles if tiled and self.tiles is not None else self.decoding
        if offload == "none":
            return self.text + sum(self.transformers) + self.vae + max(self.denoising, decoding)
        if offload == "text":
            return sum(self.transformers) + self.vae + max(self.denoising, decoding)
        if offload == "model":
            return max(self.text, max(self.transformers) + self.denoising, self.vae + decoding)
        return max(self.denoising, decoding) + max(self.text, *self.transformers) // 20  # some layers at a time


def fitted(
    request: "Request", files: ModelFiles, family: Family | None, notes: list[str], warnings: list[str]
) -> tuple["Request", Family | None, list[str], list[str]]:
    """Return a request with what it needs to stay below its ``max_memory``, and further notes and warnings on that.

    What the user chose stays; on a CPU nothing waits elsewhere, so that only tiles are left.
    """
    if request.max_memory is None:
        return request, family, notes, warnings
    from .loading import pick_device

    device_type = pick_device(request.device).type
    limit = find_hardware(request.max_memory).gib * GIB
    needs = needs_of(request, files, family, device_type)
    base = resident_now() if device_type == "cpu" else 0
    offloads = (request.offload,) if device_type == "cpu" or request.offload != "none" else OFFLOADS
    tiles = [True] if "tile" in vae_ways(request.vae) else [False, *([True] if needs.tiles is not None else [])]
    ways = [(offload, tiled) for offload in offloads for tiled in tiles]
    estimates = {way: base + needs.peak(*way) for way in ways}
    fits = [way for way in ways if estimates[way] <= SHARE * limit]
    offload, tiled = chosen = fits[0] if fits else min(ways, key=estimates.__getitem__)
    more = [name for name in vae_ways(request.vae) if name != "tile"]
    vae = ",".join([*(["tile"] if tiled else []), *more]) or None
    words = f"offload {offload}, the autoencoder {'in tiles' if tiled else 'whole'}"
    text = f"max_memory {request.max_memory}: {words}, by an estimate of {estimates[chosen] / GIB:.3g} GiB"
    request = replace(request, offload=offload, vae=vae)
    if fits:
        return request, family, [*notes, text], warnings
    text += ", the least there is, which may not fit; quantize the weights, or ask for a smaller output"
    return request, family, notes, [*warnings, text]


def used(request: "Request", peak: Mapping[str, int]) -> tuple[str, bool] | None:
    """Return in words what a run took of its ``max_memory``, and whether it stayed below; None without one."""
    if request.max_memory is None:
        return None
    most, limit = peak.get("cuda", peak["host"]), find_hardware(request.max_memory).gib * GIB
    text = f"the run took {most / GIB:.3g} GiB of max_memory {request.max_memory}"
    return text, most <= limit


def needs_of(request: "Request", files: ModelFiles, family: Family | None, device_type: str) -> Needs:
    """Estimate what a run needs, from the configs alone: weights by counting, the autoencoder by a run without data."""
    size = 4 if (request.dtype or ("float32" if device_type == "cpu" else "bfloat16")) == "float32" else 2
    transformers = [
        _weights(empty_model(read_config(files.name, f"{name}/config.json", request.revision)), size, request.quantize)
        for name in TRANSFORMERS if files.has(name)
    ]  # fmt: skip
    text = sum(_text_encoder(files, name, size, request) for name in text_encoders(files.index))
    vae = empty_model(files.vae) if files.vae else None
    whole, tiles = (0, None) if vae is None or family is None else decoding_bytes(files.vae, request, family)
    return Needs(
        text=text, transformers=tuple(transformers), vae=0 if vae is None else _weights(vae, 4, None),
        denoising=denoising_bytes(request, family, size), decoding=whole, tiles=tiles,
    )  # fmt: skip


def _weights(model: Any, size: int, quantize: str | None) -> int:
    """Return the bytes of a model's weights: matrices of linear layers as they are quantised, the rest of ``size``."""
    import torch

    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    rest = sum(weight.numel() for weight in model.parameters()) - linear
    return round(rest * size + linear * (QUANTIZATIONS[quantize][1] if quantize else size))


def _text_encoder(files: ModelFiles, name: str, size: int, request: "Request") -> int:
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.for_model(**read_config(files.name, f"{name}/config.json", request.revision))
    with init_empty_weights():
        model = getattr(transformers, files.index[name][1])(config)
    return _weights(model, size, request.quantize_text_encoder)


def denoising_bytes(request: "Request", family: Family | None, size: int) -> int:
    """Estimate the activations of a block: its tokens, some copies in 32 bits, and the middle of its feed-forward."""
    if family is None:
        return 0
    layout = token_layout(family, height=_of(request, family, "height"), width=_of(request, family, "width"),
                          num_frames=_of(request, family, "num_frames"))  # fmt: skip
    return layout.tokens * (family.heads * family.head_dim * (6 * size + 8) + 2 * family.ffn_dim * size)


def decoding_bytes(config: Mapping[str, Any], request: "Request", family: Family) -> tuple[int, int | None]:
    """Return the activations of decoding a request's output whole, and in tiles; None where there are none.

    ``config``: the autoencoder's.
    """
    height, width = _of(request, family, "height"), _of(request, family, "width")
    frames, vae, text = _of(request, family, "num_frames"), empty_model(config), json.dumps(config, sort_keys=True)
    whole = _decoded(text, family.vae, frames, height, width)
    tile = getattr(vae, "tile_sample_min_height", None) or getattr(vae, "tile_sample_min_size", None)
    if tile is None or not hasattr(vae, "use_tiling"):
        return whole, None
    one = _decoded(text, family.vae, frames, min(tile, height), min(tile, width))
    return whole, min(whole, one + 3 * 4 * 3 * frames * height * width)  # the rows of tiles, blended, and the output


def _of(request: "Request", family: Family, name: str) -> int:
    return getattr(request, name) or getattr(family, name) or 1


@functools.lru_cache(maxsize=32)
def _decoded(config: str, scales: tuple[int, int], frames: int, height: int, width: int) -> int:
    """Return the most bytes alive while an autoencoder of a config decodes without data."""
    import torch

    vae, (step, scale) = empty_model(json.loads(config)).to("meta"), scales
    latents = [1, vae.config.get("latent_channels") or vae.config.get("z_dim") or 16, height // scale, width // scale]
    if step > 1:
        latents.insert(2, (frames - 1) // step + 1)
    with torch.no_grad(), most_alive() as most:
        vae.decode(torch.empty(latents, device="meta"))
    return most[0]


@contextlib.contextmanager
def most_alive() -> Iterator[list[int]]:
    """Count the bytes of tensors that operations in the block make; yields a list that holds the most at a time."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    now, most, seen = [0], [0], weakref.WeakSet[Any]()

    def storages(values: Any) -> Iterator[Any]:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor) and value.untyped_storage() not in seen:
                seen.add(value.untyped_storage())
                yield value.untyped_storage()

    def gone(size: int) -> None:
        now[0] -= size

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            weights_and_inputs = [*storages((args, kwargs))]  # which are there before, and views of them later
            result = func(*args, **(kwargs or {}))
            del weights_and_inputs
            for storage in storages(result):
                now[0] += storage.nbytes()
                most[0] = max(most[0], now[0])
                weakref.finalize(storage, gone, storage.nbytes())
            return result

    class Fused(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention:  # which without data would lay out all scores
                return torch.empty_like((*args, *(kwargs or {}).values())[0])
            return func(*args, **(kwargs or {}))

    with Fused(), Counting():
        yield most
