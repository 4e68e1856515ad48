"""Tiny transformers under check: how one is described, made, fed and run as a pipeline would run it."""

import contextlib
import copy
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, Grid
from ..adapters.rotary import GIVEN, VISUAL_AXES, Axis, Rope, rope_of
from ..errors import ConfigError
from ..methods.guidance.rows import rows_of
from .recording import WIDE, require

STEPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """A tiny transformer and the inputs of one forward.

    Attributes:
        transformer: the class; the adapter must cover it.
        config: its arguments: two or three blocks of each kind, 16 to 32 channels per head.
        inputs: batch -> the forward's keyword arguments, tensors random and of ``batch`` rows. 100 to 300 tokens in
            five frames or more, frames, height and width all different; masks with rows of different lengths.
        left_alone: module-name patterns of the attention modules that no method may touch: cross-attention, refiners.
        reference_frames: frames among the latents that the adapter counts as text.
        max_batch: rows that one forward takes; 1 for a model that packs its rows into one sequence.
    """

    transformer: type[nn.Module]
    config: Mapping[str, Any]
    inputs: Callable[[int], Mapping[str, Any]]
    left_alone: tuple[str, ...] = ()
    reference_frames: int = 0
    max_batch: int = 2


class Case:
    """One tiny model under check, and the adapter that covers it."""

    def __init__(self, adapter: Adapter, model: TinyModel) -> None:
        self.adapter = adapter
        self.model = model
        torch.manual_seed(0)
        self.transformer: Any = model.transformer(**model.config).eval()
        for parameter in self.transformer.parameters():  # a gate of an untrained model would hide what stands behind it
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        self.plain: dict[Any, Tensor] = {}
        """What the untouched model gave, by whatever tells it: checks that share a case compute it once."""

    def inputs(self, batch: int = 1, seed: int = 1) -> dict[str, Any]:
        """The same random inputs at every call; row 0 of two rows is not the one row of a batch of one."""
        torch.manual_seed(seed)
        inputs = dict(self.model.inputs(min(batch, self.model.max_batch)))
        rope, config = self.rope, self.transformer.config
        if rope is not None and rope.form in GIVEN:
            grid = self.adapter.grid(config, inputs)
            require(not isinstance(grid, str), f"the tiny model's inputs have no grid: {grid}")
            inputs[rope.input] = given_positions(rope, rope.axes(config), grid, inputs[rope.input])  # type: ignore[arg-type]
        return inputs

    @property
    def rope(self) -> Rope | None:
        """Its rotary positions, or None where it has none that the adapter describes."""
        try:
            return rope_of(self.adapter.name, self.adapter.rope, self.transformer.config)
        except ConfigError:
            return None

    def require_own_forward(self, name: str) -> None:
        """Raise `AssertionError` if the untouched model does not run on its own inputs."""
        try:
            for batch in range(1, self.model.max_batch + 1):
                with torch.no_grad():
                    self.transformer(**self.inputs(batch), return_dict=False)
        except Exception as error:
            raise AssertionError(
                f"{name}: the tiny model's own forward fails, before anything is attached: "
                f"{type(error).__name__}: {error}; correct its config or its inputs"
            ) from error

    def latents(self, inputs: Mapping[str, Any]) -> Tensor:
        """The latents among the inputs; the last of a list, which is the one that is made."""
        latents = inputs[self.adapter.latents]
        return latents if isinstance(latents, Tensor) else latents[-1]

    def row(self, inputs: Mapping[str, Any], row: int) -> dict[str, Any]:
        """One row of a batch's inputs."""
        batch = len(inputs[self.adapter.latents])
        return rows_of(inputs, slice(row, row + 1), batch, self.adapter)

    def with_latents(self, inputs: Mapping[str, Any], latents: Tensor) -> dict[str, Any]:
        """The inputs with other latents."""
        old = inputs[self.adapter.latents]
        return {**inputs, self.adapter.latents: latents if isinstance(old, Tensor) else [*old[:-1], latents]}

    def with_other_padding(self, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The inputs with other text where a mask hides it, or None where nothing is hidden."""
        masks = ("encoder_attention_mask", "encoder_hidden_states_mask", "attention_mask")
        mask = next((inputs[name] for name in masks if inputs.get(name) is not None), None)
        text = inputs.get("encoder_hidden_states")
        if mask is None or text is None:
            return None
        several = text.ndim == 4 and text.shape[1] != mask.shape[1] == text.shape[2]
        axis = 2 if several else 1  # Bria Fibo 2 takes several layers of its encoder
        visible = mask.bool()[:, : text.shape[axis]]
        if bool(visible.all()):
            return None
        shape = [text.shape[0], *(text.shape[axis] if i == axis else 1 for i in range(1, text.ndim))]
        return {**inputs, "encoder_hidden_states": torch.where(visible.reshape(shape), text, 3.0)}

    def wide(self) -> Any:
        """The transformer in float64, so that a difference is more than rounding, but for what it rounds itself."""
        wide = copy.deepcopy(self.transformer).double()
        for module in wide.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda linear, inputs: (inputs[0].to(linear.weight.dtype),))
        return wide

    def run_after(self, warm: int, inputs: Mapping[str, Any], branch: str = "cond", transformer: Any = None) -> Tensor:
        """A forward at step ``warm``, after those of the steps before it, all on the same inputs."""
        for step in range(warm):
            self.run(inputs, step, branch, transformer)
        return self.run(inputs, warm, branch, transformer)

    def run(
        self, inputs: Mapping[str, Any], step: int = 0, branch: str = "cond", transformer: Any = None,
        differentiate: bool = False,
    ) -> Tensor:  # fmt: skip
        """One forward, as a pipeline makes it, or one that trains; its video."""
        transformer = transformer or self.transformer
        inputs, context = dict(inputs), contextlib.nullcontext()
        if hasattr(self.model.transformer, "cache_context"):
            context = transformer.cache_context(
                branch, step_index=step, num_inference_steps=STEPS, sigma=1 - step / STEPS
            )
        else:  # the timestep alone says which step it is
            if hasattr(transformer, "cache_context"):  # methods are attached
                context = transformer.cache_context(branch)
            time = inputs[self.adapter.timestep]
            inputs[self.adapter.timestep] = (time.double() * (1 - step / 100)).to(time.dtype)
        with torch.set_grad_enabled(differentiate), context:
            out = transformer(**inputs, return_dict=False)
        out = out if isinstance(out, Tensor) else out[0]
        if isinstance(out, Tensor):
            return out
        return torch.stack(out) if self.model.max_batch > 1 else out[-1]  # one per row, or the last is the one made


def require_patterns_match(adapter: Adapter, cases: Sequence[Case]) -> None:
    """Raise `AssertionError` for a pattern that matches no attention module in any model of an adapter."""
    modules = (module for case in cases for module in case.transformer.named_modules())
    names = {name for name, module in modules if hasattr(module, "processor")}
    for part, patterns in (("self", adapter.self_attention), ("side", adapter.side_attention)):
        for pattern in patterns:
            text = f"{part}_attention {pattern!r} matches no attention module of any tiny model"
            require(bool(fnmatch.filter(names, pattern)), f"adapter {adapter.name!r}: check 'places' failed: {text}")


def wide_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with floating-point tensors in float64."""
    return {name: _widened(x) for name, x in inputs.items()}


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(WIDE) if value.is_floating_point() else value
    return type(value)(_widened(item) for item in value) if isinstance(value, (tuple, list)) else value


def given_positions(rope: Rope, axes: tuple[Axis, ...], grid: Grid, value: Any) -> Any:
    """Return a forward's input of positions as a pipeline makes it at the trained size: from 0 on, in float32."""
    sizes: dict[str, int] = dict(zip(VISUAL_AXES, grid[:3], strict=True))
    if rope.form == "plane":
        sizes.update(height=value.shape[0], width=value.shape[1])
    tables = {}
    for axis in axes:
        angles = torch.outer(torch.arange(float(sizes[axis.name])), torch.from_numpy(axis.frequencies()).float())
        tables[axis.name] = torch.polar(torch.ones_like(angles), angles)
    if rope.form == "tables of axes":
        whole = [torch.cat([table, table], -1) for table in tables.values()]
        return [(z.real.clone(), z.imag.clone()) for z in whole], value[1]
    if rope.form == "plane":
        height, width = (tables[axis.name] for axis in axes)
        pair = (height[:, None].expand(-1, len(width), -1), width[None].expand(len(height), -1, -1))
        return torch.stack(pair, -1).flatten(-2)
    z = spread({name: table.repeat_interleave(2, -1) for name, table in tables.items()}, grid)
    return z.real.clone(), z.imag.clone()


def spread(tables: Mapping[str, Tensor], grid: Grid) -> Tensor:
    """Lay a table [positions, channels] of each axis over the grid's tokens, their channels side by side."""
    shapes = {name: [-1 if name == other else 1 for other in VISUAL_AXES] for name in tables}
    parts = [table.reshape(*shapes[name], table.shape[-1]).expand(*grid[:3], -1) for name, table in tables.items()]
    return torch.cat(parts, -1).flatten(0, 2)


def tiny_wan() -> TinyModel:
    """Return a Wan transformer of 3 blocks and 2 heads, and inputs of 7 x 4 x 8 tokens."""
    from diffusers import WanTransformer3DModel

    return TinyModel(
        transformer=WanTransformer3DModel,
        config=dict(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=32, ffn_dim=48, num_layers=3, rope_max_seq_len=64,
        ),
        inputs=lambda batch: dict(
            hidden_states=torch.randn(batch, 4, 7, 8, 16), timestep=torch.full((batch,), 500.0),
            encoder_hidden_states=torch.randn(batch, 6, 16),
        ),
        left_alone=("blocks.*.attn2",),
    )  # fmt: skip
