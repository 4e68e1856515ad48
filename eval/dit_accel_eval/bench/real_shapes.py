"""Transformers of released models' shapes, of few layers with random weights; their inputs, and their memory."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from dit_accel import ConfigError
from dit_accel.adapters import installed
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.errors import did_you_mean
from dit_accel.estimate.prediction import Prediction
from dit_accel.plan.layout import TokenLayout

Inputs = dict[str, Any]

LATENTS = {
    "cogvideox": "fchw", "flux": "sc", "hunyuan-video": "cfhw", "ltx": "sc", "mochi": "cfhw", "sd3": "chw",
    "wan": "cfhw",
}  # fmt: skip
"""Adapter -> the axes of its latents: channels, frames, height and width, or packed tokens and channels."""

TEXT_WIDTH = 4096  # channels of T5's and Llama's text, which all of these models take
MIDDLE = {"flux": 0.5}  # adapter -> the timestep in the middle of a run, where that is not 500
EXACT = ("timestep", "img_ids", "txt_ids", "guidance")  # inputs that stay in float32


def find_family(name: str) -> tuple[Adapter, Family]:
    """Return a family whose transformers can be made here, with its adapter."""
    adapter, family = installed.described(name)
    if adapter.name not in LATENTS:
        known = [member.name for key in LATENTS for member in installed.adapters()[key].families]
        raise ConfigError(f"bench can't make the inputs of {name} yet; {did_you_mean(name, known)}")
    return adapter, family


def make_model(adapter: Adapter, family: Family, planned: Prediction) -> tuple[Any, Inputs]:
    """Return a transformer with random weights, float32 on the CPU, and the inputs of one forward of one row."""
    import diffusers

    layout, (step, scale) = planned.layout, family.vae
    latents = {
        "f": 1 + (planned.num_frames - 1) // step, "h": planned.height // scale, "w": planned.width // scale,
        "s": layout.visual_tokens,
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(diffusers, adapter.transformers[0])
    options, layers = {**_config(family, latents), "num_layers": family.layers}, family.layers
    if "num_single_layers" in _names(model):  # of double and single ones a third and the rest
        if layers < 2:
            raise ConfigError(f"{family.name} has two kinds of blocks, got --layers {layers}; ask for 2 or more")
        double = max(1, round(layers / 3))
        options |= {"num_layers": double, "num_single_layers": layers - double}
    transformer = model(**{name: value for name, value in options.items() if name in _names(model)}).eval()
    latents["c"] = transformer.config.in_channels
    shape = (1, *(latents[axis] for axis in LATENTS[adapter.name]))
    known = _inputs(family, layout, transformer.config, shape, MIDDLE.get(adapter.name, 500.0))
    inputs = {name: value for name, value in known.items() if name in _names(transformer.forward)}
    grid, expected = adapter.grid(transformer.config, inputs), (layout.frames, layout.height, layout.width)
    if isinstance(grid, str) or grid[:3] != expected:
        raise ConfigError(f"a forward of {family.name} has the grid {grid}, but the plan says {expected}")
    return transformer, inputs


def _names(call: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(call).parameters


def _config(family: Family, latents: Mapping[str, int]) -> dict[str, Any]:
    """Return the sizes of a family by all names that diffusers' configs give them; each class takes some of them."""
    width, side = family.heads * family.head_dim, max(192, latents["h"] // 2, latents["w"] // 2)
    sizes = dict(
        num_attention_heads=family.heads, attention_head_dim=family.head_dim, ffn_dim=family.ffn_dim,
        cross_attention_dim=width, caption_projection_dim=width, guidance_embeds=True, pos_embed_max_size=side,
        max_text_seq_length=family.text_tokens, sample_frames=4 * latents["f"] - 3, sample_height=latents["h"],
        sample_width=latents["w"],
    )  # fmt: skip
    return sizes if family.in_channels is None else {**sizes, "in_channels": family.in_channels}


def _inputs(family: Family, layout: TokenLayout, config: Any, latents: tuple[int, ...], time: float) -> Inputs:
    """Return the inputs of a forward by all names that diffusers' transformers give them; each takes some of them."""
    text, (rows, columns) = family.text_tokens or family.cross_tokens, (layout.height, layout.width)
    places = torch.cartesian_prod(torch.arange(1.0), torch.arange(float(rows)), torch.arange(float(columns)))
    return dict(
        hidden_states=torch.randn(latents), timestep=torch.tensor([time]), guidance=torch.tensor([7 * time]),
        encoder_hidden_states=torch.randn(1, text, TEXT_WIDTH), encoder_attention_mask=torch.ones(1, text).bool(),
        pooled_projections=torch.randn(1, config.get("pooled_projection_dim", 1)), txt_ids=torch.zeros(text, 3),
        img_ids=places, num_frames=layout.frames, height=rows, width=columns,
    )  # fmt: skip


def to_device(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return inputs on a device, floats in the dtype but for `EXACT`."""
    return {
        name: value.to(device, dtype if value.is_floating_point() and name not in EXACT else None)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


WHOLE = {"_native_math": 3.0, "flex": 4.0}  # backend of diffusers that holds every logit -> how many copies of 32 bits
PROCESS = 3 << 28  # bytes of a process that has loaded torch and diffusers
WIDTHS, HIDDEN = 16, 2  # copies of a token that a block holds at most, of the model's width and of its feed-forward's

CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Where Linux tells a container's memory: the folder, its limit, what is used, and what of that it can take back."""


def memory_of_model(plan: Any, dtype: torch.dtype) -> int:
    """Return about how many bytes a forward takes at most on the device, besides logits: weights, a block's tensors."""
    family, tokens = plan.family, plan.dense.layout.tokens
    with init_empty_weights():
        transformer = make_model(plan.adapter, family, plan.dense)[0]
    weights = sum(weight.numel() for weight in transformer.parameters())
    block = tokens * (WIDTHS * family.heads * family.head_dim + HIDDEN * (family.ffn_dim or 0))
    return dtype.itemsize * (weights + block) + PROCESS


def memory_of_logits(plan: Any, backend: str | None) -> int:
    """Return about how many bytes a backend of diffusers takes for the logits of an attention call."""
    return round(4 * WHOLE.get(backend or "", 0) * plan.family.heads * plan.dense.layout.tokens**2)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, by the system and by the container; None where neither says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(filter(None, (*_of_system(), *_of_containers())), default=None) if device.type == "cpu" else None


def _of_system() -> Iterator[int]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _of_containers() -> Iterator[int]:
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        groups = {PurePosixPath(line.split(":", 2)[2]) for line in lines}
        for root, limit, used, cached in CGROUPS:
            for group in {above for path in groups for above in (path, *path.parents)}:
                folder = Path(root) / str(group).lstrip("/")
                with contextlib.suppress(OSError, ValueError, KeyError):  # there is no such folder, or no limit
                    most, taken = (int((folder / name).read_text()) for name in (limit, used))
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    yield max(1, most - taken + int(stat[cached]))
