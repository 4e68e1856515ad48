"""What the nodes' package meets of ComfyUI, small: a model patcher, a sampler's loop, wrappers, attention, two models.

`SIGNATURES` are ComfyUI's own; where its code is at hand, a test holds them against it.
"""

import itertools
import uuid
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIGNATURES = {
    "attention": "q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, kwargs",
    "add_wrapper_with_key": "self, wrapper_type, key, wrapper",
    "remove_wrappers_with_key": "self, wrapper_type, key",
    "outer_sample": "outer_sample",
    "diffusion_model": "diffusion_model",
    "wan": "self, x, timestep, context, clip_fea, time_dim_concat, transformer_options, kwargs",
    "flux": "self, x, timestep, context, y, guidance, ref_latents, control, transformer_options, kwargs",
}
SLOT = "optimized_attention_override"


def plain(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """Dense attention by PyTorch, of the arguments that ComfyUI passes."""
    if not skip_reshape:
        size = q.shape[-1] // heads
        q, k, v = (x.unflatten(2, (-1, size)).transpose(1, 2) for x in (q, k, v))
    if mask is not None and mask.ndim < 4:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"), enable_gqa=gqa)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def optimized_attention(*args: Any, transformer_options: dict[str, Any], **kwargs: Any) -> Tensor:
    """Attention through the slot, where something holds it."""
    kwargs |= {"transformer_options": transformer_options, "_inside_attn_wrapper": True}
    override = transformer_options.get(SLOT)
    return plain(*args, **kwargs) if override is None else override(plain, *args, **kwargs)


class Executor:
    """One call with wrappers around it."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: list[Any]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        first, *rest = self.wrappers
        return first(Executor(self.original, self.class_obj, rest), *args, **kwargs)


def wrapped(original: Any, owner: Any, kind: str, options: dict[str, Any]) -> Executor:
    found = options.get("wrappers", {}).get(kind, {}).values()
    return Executor(original, owner, [one for ones in found for one in ones])


class Layer(nn.Module):
    """Self-attention over a sequence, and cross-attention to a text."""

    def __init__(self, heads: int, size: int, text: int, cross: bool) -> None:
        super().__init__()
        self.heads, width = heads, heads * size
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.text = nn.Linear(text, 3 * width) if cross else None

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        q, k, v = (2 * self.qkv(F.layer_norm(x, x.shape[-1:]))).chunk(3, -1)
        x = x + self.out(optimized_attention(q, k, v, heads=self.heads, transformer_options=options))
        if self.text is None:
            return x
        _, k, v = self.text(context).chunk(3, -1)
        return x + self.out(optimized_attention(q, k, v, heads=self.heads, transformer_options=options))


class Model(nn.Module):
    """A transformer of latents [B, C, T, H, W] or [B, C, H, W] in patches of 1 x 2 x 2."""

    patch_size: Any = (1, 2, 2)
    joint = False

    def __init__(self, layers: int = 2, heads: int = 2, size: int = 16, text: int = 8) -> None:
        super().__init__()
        self.num_heads = heads
        self.blocks = nn.ModuleList(Layer(heads, size, text, not self.joint) for _ in range(layers))
        self.inside, self.outside = nn.Linear(16, heads * size), nn.Linear(heads * size, 16)
        self.words = nn.Linear(text, heads * size)
        generator = torch.Generator().manual_seed(0)
        for weight in self.parameters():
            weight.data.normal_(std=weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1, generator=generator)

    def forward_orig(self, x: Tensor, timestep: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        image = x.ndim == 4
        x = x[:, :, None] if image else x
        batch, channels, frames, height, width = x.shape
        x = x.reshape(batch, channels, frames, height // 2, 2, width // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
        tokens = self.inside(x.reshape(batch, -1, channels * 4)) * (1 + timestep.view(-1, 1, 1))
        text = context.shape[1] if self.joint else 0
        if text:
            tokens = torch.cat([self.words(context), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens, context, options)
        x = self.outside(tokens[:, text:]).reshape(batch, frames, height // 2, width // 2, channels, 2, 2)
        x = x.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, channels, frames, height, width)
        return x[:, :, 0] if image else x


class Wan(Model):
    """Text by cross-attention."""

    def forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options={}, **kwargs):  # noqa: B006
        call = wrapped(self._forward, self, "diffusion_model", transformer_options)
        return call(x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs)

    def _forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options={}, **kwargs):  # noqa: B006
        return self.forward_orig(x, timestep, context, transformer_options)


class Flux(Model):
    """Text in the sequence, before the picture."""

    patch_size = 2
    joint = True

    def forward(self, x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006
        call = wrapped(self._forward, self, "diffusion_model", transformer_options)
        return call(x, timestep, context, None, None, None, None, transformer_options, **kwargs)

    def _forward(  # ComfyUI's defaults
        self, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None,
        transformer_options={}, **kwargs,  # noqa: B006
    ):  # fmt: skip
        return self.forward_orig(x, timestep, context, transformer_options)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(one) for name, one in value.items()}
    return list(value) if isinstance(value, list) else value


class Patcher:
    """A model with what nodes put on it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}

    def clone(self) -> "Patcher":
        new = Patcher(self.model)
        new.model_options, new.wrappers = _copied(self.model_options), _copied(self.wrappers)
        return new

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, wrapper_type: str, key: str) -> None:
        self.wrappers.get(wrapper_type, {}).pop(key, None)


def sample(
    patcher: Patcher, noise: Tensor, prompts: list[Tensor], steps: int = 6, *, together: bool = True,
    each: Callable[[int], Any] = lambda step: None, calls: int = 1,
) -> Tensor:  # fmt: skip
    """Return what Euler's steps make of noise under one prompt or two, in one forward or in one each.

    ``each`` is called before every step, ``calls`` is how often the model is called in each.
    """
    guider = SimpleNamespace(model_options=_copied(patcher.model_options))
    guider.model_options["transformer_options"]["wrappers"] = _copied(patcher.wrappers)
    names = [uuid.uuid4() for _ in prompts]
    sigmas = torch.linspace(1, 0, steps + 1)

    def outer(x: Tensor) -> Tensor:
        for step, (now, then) in enumerate(itertools.pairwise(sigmas)):
            each(step)
            for _ in range(calls):
                parts = []
                for rows in [range(len(prompts))] if together else [[row] for row in range(len(prompts))]:
                    options = _copied(guider.model_options)["transformer_options"]
                    options |= {
                        "sample_sigmas": sigmas, "sigmas": now.expand(len(rows)), "cond_or_uncond": list(rows),
                        "uuids": [names[row] for row in rows],
                    }  # fmt: skip
                    text = torch.cat([prompts[row] for row in rows])
                    latents = torch.cat([x] * len(rows))
                    out = patcher.model(latents, now.expand(len(rows)), text, transformer_options=options)
                    assert SLOT not in options or not type(options[SLOT]).__module__.startswith("dit_accel")
                    parts += out.chunk(len(rows))
            first, *others = parts
            x = x + (then - now) * (first if not others else others[0] + 3 * (first - others[0]))
        return x

    with torch.inference_mode():
        out = wrapped(outer, guider, "outer_sample", guider.model_options["transformer_options"])(noise.clone())
    assert "dit_accel_run" not in guider.model_options["transformer_options"]
    return out
