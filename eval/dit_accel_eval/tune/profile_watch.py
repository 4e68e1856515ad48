"""Watches one generation for its profile: attention received, what blocks add, and which tokens are foreground."""

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_accel import ConfigError
from dit_accel.adapters.blocks import block_signature
from dit_accel.attachment.execution import PlannedCall
from dit_accel.attachment.layers import TransformerState
from dit_accel.attachment.site import find_blocks
from dit_accel.methods.base import AttentionHandler, Model, Phase
from dit_accel.methods.caches.easy import mean_size
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.site import Block, target_sample
from dit_accel.plan.layout import TokenLayout
from dit_accel.rules.foreground import foreground, predicted

from .block_ranking import foreground_ratio
from .received import attention_received

CRITERIA = ("attention", "delta", "error")
"""What blocks are judged by. ``attention``: the share of the foreground that receives more attention than the mean
token. ``delta``: how much what the block adds changed since the last step, over what it adds. ``error``: the same over
the last block's stream. Blocks of low scores are cached."""


class WatchConfig(MethodConfig):
    """Asks for `Watch`."""

    name = "watch"


class Watch(AttentionHandler):
    """Sends every attention call through the plan, which it leaves as it is, so that observers see it."""

    config_type = WatchConfig
    phase = Phase.LISTS


@dataclass(slots=True)
class Scores:
    """What was noted of one transformer in one run: criterion -> (block, step) -> value, and the samples' errors."""

    values: dict[str, dict[tuple[int, int], float]] = field(default_factory=lambda: {name: {} for name in CRITERIA})
    errors: list[float] = field(default_factory=list)

    def matrix(self, criterion: str, blocks: int) -> list[list[float | None]]:
        """Return the values [block][step]; None where there is none."""
        found = self.values[criterion]
        steps = 1 + max((step for _, step in found), default=-1)
        return [[found.get((block, step)) for step in range(steps)] for block in range(blocks)]


class Profiler:
    """Notes what a run's blocks do, in the first branch of each step.

    Args:
        attachment: what is attached; it is watched from `watching` on.
        queries: how many queries of each call are looked at; None: all.
        seed: of the choice of queries.
        mask: the foreground, bool [frames or 1, height, width] in pixels; None: what moves.
        attention: attention must be measured; else an image without a mask, in which nothing moves, goes without.
    """

    def __init__(
        self, attachment: Any, queries: int | None, seed: int, mask: np.ndarray | None, attention: bool
    ) -> None:
        self._attachment = attachment
        self._attention = attention
        self._execution = attachment._execution
        self._queries, self._mask = queries, mask
        self._generator = torch.Generator().manual_seed(seed)
        self._states: dict[str, TransformerState] = {layer.state.name: layer.state for layer in self._execution.layers}
        self._blocks = {name: find_blocks(one.adapter, one.transformer) for name, one in self._states.items()}
        self._of_layer = {name: self._layers(name) for name in self._states}
        self.scores: dict[str, Scores] = defaultdict(Scores)
        self.masks: dict[int, np.ndarray] = {}
        self._leading: dict[tuple[str, int], str] = {}
        self._received: dict[int, list[Tensor]] = defaultdict(list)
        self._now: dict[int, Tensor] = {}
        self._last: dict[tuple[str, int], tuple[int, Tensor]] = {}

    def blocks(self, name: str) -> tuple[Block, ...]:
        """Return a transformer's blocks."""
        return self._blocks[name]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch whatever runs inside the block."""
        execution, first = self._execution, self._execution.layers[0].state
        handlers = execution.handlers
        described = Model(adapter=first.adapter, family=None, heads=0, layers=0)
        with contextlib.ExitStack() as stack:
            stack.callback(execution.use, handlers)
            execution.use((Watch(WatchConfig(), described), *handlers))
            stack.enter_context(self._attachment.observe(self._attended))
            for name, state in self._states.items():
                for block in self._blocks[name]:
                    hook = partial(self._added, name, block)
                    stack.callback(block.module.register_forward_hook(hook, with_kwargs=True).remove)
                names = list(inspect.signature(type(state.transformer).forward).parameters)[1:]
                hook = partial(self._ended, name, names)
                stack.callback(state.transformer.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _layers(self, name: str) -> dict[int, int]:
        """Return layer index -> block index of a transformer."""
        found, state = {}, self._states[name]
        names = {id(module): path for path, module in state.transformer.named_modules()}
        for layer in state.layers:
            path = names[id(layer.module)]
            owner = next((b for b in self._blocks[name] if path.startswith(f"{b.name}.") or path == b.name), None)
            if owner is not None:
                found[layer.index] = owner.index
        return found

    def _leads(self, name: str) -> bool:
        """Tell whether the running branch is the first of its step."""
        state = self._states[name]
        key = name, self._execution.state.step_index
        return self._leading.setdefault(key, state.branch) == state.branch

    def _attended(self, planned: PlannedCall) -> None:
        call, context = planned.call, planned.context
        block = self._of_layer[context.transformer].get(context.layer)
        if block is None or not self._leads(context.transformer) or not self._has_foreground(context.layout):
            return
        rows = None
        visual = context.layout.visual
        if self._queries is not None and self._queries < context.layout.visual_tokens:
            chosen = torch.randperm(context.layout.visual_tokens, generator=self._generator)[: self._queries]
            rows = (chosen + visual.start).to(call.q.device)
        q = call.q if rows is not None else call.q[:, :, visual]
        found, error = attention_received(q, call.k, scale=call.scale, key_mask=call.key_mask(), rows=rows)
        found, error = found[visual], error[visual]
        self._received[block].append(found)
        if rows is not None:
            self.scores[context.transformer].errors.append(float(error.mean() / found.mean()))

    def _added(self, name: str, block: Block, module: Any, args: Any, kwargs: Any, result: Any) -> None:
        if not self._leads(name):
            return
        signature = block_signature(block.list, type(module))
        before, after = signature.read_call(args, kwargs)[0], signature.read_result(result)[0]
        assert before is not None
        assert after is not None
        step, scores = self._execution.state.step_index, self.scores[name].values
        added = (after.detach() - before.detach()).float()
        known = self._last.get((name, block.index))
        if known is not None and known[1].shape == added.shape and known[0] < step:
            change, size = mean_size(added - known[1]), mean_size(added)
            scores["delta"][block.index, step] = float(change / size)
            self._now[block.index] = change
        self._last[name, block.index] = step, added
        if block.index == len(self._blocks[name]) - 1:
            whole = mean_size(after.detach())
            for index, change in self._now.items():
                scores["error"][index, step] = float(change / whole)
            self._now.clear()

    def _ended(self, name: str, names: Sequence[str], module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if not self._leads(name):
            return
        state, step = self._states[name], self._execution.state.step_index
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = self._foreground(state, inputs, output)
        if mask is None:
            return
        self.masks[step] = mask
        for block, received in self._received.items():
            values = torch.stack(received).mean(0).cpu().numpy().reshape(mask.shape)
            ratio = foreground_ratio(values, mask)
            if ratio == ratio:
                self.scores[name].values["attention"][block, step] = ratio
        self._received.clear()

    def _has_foreground(self, layout: TokenLayout) -> bool:
        """Tell whether something may move, or a mask was given."""
        return layout.frames > 1 or self._mask is not None

    def _foreground(self, state: TransformerState, inputs: Any, output: Any) -> np.ndarray | None:
        """Return the foreground of a step, bool [F, Y, X]; None for an image without a mask."""
        layout = self._execution.forward.layout
        if layout is None:
            raise ConfigError(f"tune profile can't tell {state.name}'s tokens in this call; profile another model")
        grid = layout.frames, layout.height, layout.width
        if self._mask is not None:
            return on_grid(self._mask, grid)
        if not self._has_foreground(layout):
            if self._attention:
                raise ConfigError(
                    "tune profile finds the foreground by what moves, and an image does not; give --mask, or use "
                    "--criterion error or delta"
                )
            return None
        sigma = self._execution.state.context(state).sigma
        if sigma is None or not 0 <= sigma <= 1:
            raise ConfigError(
                f"tune profile reads the foreground off a flow model's prediction, and the scheduler tells the noise "
                f"level {sigma}; give --mask"
            )
        x, v = target_sample(inputs[state.adapter.latents]), target_sample(output)
        clean = predicted(x, v, sigma, grid, layout.text_before, layout.text_after)
        if clean is None:
            raise ConfigError(
                f"tune profile can't lay what {state.name} predicts on its {grid[0]} x {grid[1]} x {grid[2]} tokens; "
                "give --mask"
            )
        return foreground(clean).cpu().numpy()


def on_grid(mask: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Return a mask in pixels, of the run's proportions, as one of tokens, bool [F, Y, X]: half or more decides."""
    (count, height, width), (frames, rows, columns) = mask.shape, grid
    if height % rows or width % columns or height // rows != width // columns:
        raise ConfigError(
            f"the mask has {height} x {width} pixels, and the run {rows} x {columns} tokens a frame; give one of the "
            "run's height and width"
        )
    if count != 1 and count != frames and (frames == 1 or (count - 1) % (frames - 1)):
        raise ConfigError(
            f"the mask has {count} frames, and the run {frames} of tokens; give one of the run's frames, or one picture"
        )
    share = mask.reshape(count, rows, height // rows, columns, width // columns).mean((2, 4))
    chosen = np.linspace(0, count - 1, frames).round().astype(int)
    return share[chosen] >= 0.5
