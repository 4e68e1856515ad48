"""What is done around a pipeline's whole call: its seconds are taken, and a smaller picture may come first.

A call can't be wrapped on an object, only on its class. But every pipeline of diffusers checks its inputs first, or
encodes the prompt, and lets its models go last; these methods are the object's to shadow. For a picture larger than
trained the pipeline may be called in two stages: a small one first, which then leads the other.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AttachError, ConfigError
from ..methods.base import Handler
from ..methods.positions.guide import SmallPicture
from ..methods.positions.ultraimage import UltraImageHandler
from ..report import clock
from ..report.recorder import Recorder
from .seam import shadow
from .state import DenoisingState
from .steps import current_run

BEGINS = ("check_inputs", "encode_prompt")
"""Methods of which a pipeline calls the first that it has before anything else."""

ENDS = "maybe_free_model_hooks"
"""The method that a pipeline calls last, once the frames are decoded."""


def watch_call(denoising: DenoisingState, transformer: nn.Module) -> list[Callable[[], None]]:
    """Have the clock of each run know the seconds of the pipeline's call that it was; return what undoes that.

    A pipeline without such methods is left alone, and the clock knows the denoising loop alone.

    ``transformer``: one of the pipeline's, by which calls of its own are told from a user's of its methods.
    """
    pipe = denoising.pipe
    engine = denoising.engine
    first = next((name for name in BEGINS if callable(getattr(type(pipe), name, None))), None)
    if first is None or not callable(getattr(type(pipe), ENDS, None)):
        return []
    begin, end = getattr(pipe, first), getattr(pipe, ENDS)
    begun: tuple[float, Recorder] | None = None  # when the call began, and the counts of the run before

    def begins(*args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        begun = None if current_run(transformer) is None else (clock.now(), engine.recorder)
        return begin(*args, **kwargs)

    def ends(*args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        out = end(*args, **kwargs)
        if begun is not None and engine.recorder is not begun[1]:
            engine.recorder.clock.call = clock.now() - begun[0]
        begun = None
        return out

    return [shadow(pipe, first, begins), shadow(pipe, ENDS, ends)]


def called(pipe: Any, handlers: Sequence[Handler], arguments: Mapping[str, Any]) -> Any:
    """Call a pipeline, after a small picture where a method wants one."""
    if pipe is None:
        raise AttachError(
            "call runs the pipeline, but the methods are attached to a transformer; attach to the pipeline"
        )
    wanting = next((method for method in handlers if isinstance(method, UltraImageHandler) and method.two_stages), None)
    height, width = arguments.get("height"), arguments.get("width")
    if wanting is None or height is None or width is None:
        return pipe(**arguments)
    if not (wanting.model.adapter.flow and wanting.model.adapter.makes_images):
        raise ConfigError(
            f"ultraimage.guided and ultraimage.view are not described for {type(pipe).__name__}: its adapter does not "
            "say that it predicts a flow of packed latents (Adapter.flow); leave them out"
        )
    token = _token_pixels(pipe)
    grid = height // token, width // token
    small = wanting.small_grid(*grid)
    if small is None:
        return pipe(**arguments)
    as_latents = wanting.settings.enlarge == "latents"
    first = {key: value for key, value in arguments.items() if key != "latents"}  # they are of the larger size
    first |= {"height": small[0] * token, "width": small[1] * token, "output_type": "latent" if as_latents else "pt"}
    with wanting.guide.small():
        output = _first_of(pipe(**first))
    with torch.no_grad():
        latents = _unpacked(pipe, output, small, token) if as_latents else output
        placed = _centred if wanting.settings.view else _enlarged
        clean, inside = placed(pipe, latents.float(), small, grid, as_latents)
    picture = SmallPicture(clean=clean, inside=inside, grid=small)
    with wanting.guide.following(picture), _pinned(wanting, pipe, grid):
        return pipe(**arguments)


def _token_pixels(pipe: Any) -> int:
    patch = 2 if hasattr(pipe, "_pack_latents") else int(pipe.transformer.config.patch_size)
    return pipe.vae_scale_factor * patch


def _first_of(output: Any) -> Tensor:
    pictures = output[0] if isinstance(output, tuple) else output.images
    return pictures if isinstance(pictures, Tensor) else torch.stack(list(pictures))


def _enlarged(
    pipe: Any, small: Tensor, _: tuple[int, int], grid: tuple[int, int], as_latents: bool
) -> tuple[Tensor, None]:
    """Return packed latents, at the size of a grid of tokens, of a picture [B, 3, height, width] or of its latents."""
    size = [side * (_latents_per_token(pipe) if as_latents else _token_pixels(pipe)) for side in grid]
    large = F.interpolate(small, size=size, mode="bicubic", antialias=True)
    return _packed(pipe, large if as_latents else _encoded(pipe, large.clamp(0, 1))), None


def _centred(
    pipe: Any, small: Tensor, tokens: tuple[int, int], grid: tuple[int, int], as_latents: bool
) -> tuple[Tensor, Tensor]:
    """Return packed latents of a grid of tokens that hold a small picture in the middle, and where that is."""
    latents, per = small if as_latents else _encoded(pipe, small), _latents_per_token(pipe)
    top, left = ((whole - less) // 2 * per for whole, less in zip(grid, tokens, strict=True))
    place = ..., slice(top, top + tokens[0] * per), slice(left, left + tokens[1] * per)
    clean = latents.new_zeros(*latents.shape[:2], grid[0] * per, grid[1] * per)
    inside = torch.zeros_like(clean)
    clean[place], inside[place] = latents, 1.0
    return _packed(pipe, clean), _packed(pipe, inside)[:1] > 0


def _latents_per_token(pipe: Any) -> int:
    return _token_pixels(pipe) // pipe.vae_scale_factor


def _encoded(pipe: Any, picture: Tensor) -> Tensor:
    """Return the latents [B, C, height, width] of a picture in [0, 1], shifted and scaled for the transformer."""
    vae = pipe.vae
    pixels, config = (2 * picture - 1).to(pipe._execution_device, vae.dtype), vae.config
    if config.get("latents_mean") is not None:  # of frames, of which a picture is one
        latents = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0].float()
        mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1).to(latents) for key in ("latents_mean", "latents_std"))
        return (latents - mean) / std
    latents = vae.encode(pixels).latent_dist.mode().float()
    return (latents - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]


def _packed(pipe: Any, latents: Tensor) -> Tensor:
    """Return latents [B, C, height, width] as the transformer takes them."""
    return pipe._pack_latents(latents, *latents.shape) if hasattr(pipe, "_pack_latents") else latents


def _unpacked(pipe: Any, latents: Tensor, grid: tuple[int, int], token: int) -> Tensor:
    if not hasattr(pipe, "_unpack_latents"):
        return latents
    unpacked = pipe._unpack_latents(latents, grid[0] * token, grid[1] * token, pipe.vae_scale_factor)
    return unpacked[:, :, 0] if unpacked.dim() == 5 else unpacked


@contextlib.contextmanager
def _pinned(wanting: UltraImageHandler, pipe: Any, grid: tuple[int, int]) -> Iterator[None]:
    """Hold the noise shift at its largest in the large stage, where the family asks for that."""
    family, config = wanting.model.family, pipe.scheduler.config
    most = config.get("max_image_seq_len")
    if family is None or "pinned_shift" not in family.beyond or most is None or grid[0] * grid[1] <= most:
        yield
        return
    pipe.scheduler.register_to_config(max_image_seq_len=grid[0] * grid[1])
    try:
        yield
    finally:
        pipe.scheduler.register_to_config(max_image_seq_len=most)
