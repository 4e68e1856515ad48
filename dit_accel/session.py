"""The denoising state of one attachment: which step, branch and layout is running, and the plan that follows from it.

It is updated by `cache_context` and by a forward pre-hook, both outside what users compile, and it is read by the
attention operator. Two attachments never share a session.
"""

import itertools
import math
import weakref
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dit_accel_kernels import (
    TileLists,
    block_sparse_attention_backward,
    block_sparse_attention_eager,
    resolve_backend,
)
from torch import Tensor

from .adapter import Adapter
from .errors import AttachError, ConfigError
from .layout import TokenLayout
from .masks import attend_dense, dense_gradients, is_key_padding, key_padding
from .methods.base import Handler
from .plan import AttentionPlan, Call, Moment
from .report import Recorder
from .steps import noise_level, noisiest, step_count

_SESSIONS: "weakref.WeakValueDictionary[int, Session]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()

NO_GRID = (-1, -1, -1, 0, 0)
"""What a forward whose adapter gives no grid hands to its attention calls."""


def get(number: int) -> "Session":
    """Return the session a compiled graph or processor refers to.

    Raises:
        AttachError: if its attachment is gone.
    """
    if number not in _SESSIONS:
        raise AttachError(f"attachment {number} is detached, but a processor of it still runs; attach again")
    return _SESSIONS[number]


class Place:
    """One attention module that methods may change: where it stands and the processor put on it."""

    def __init__(self, target: "Target", layer: int, depth: int) -> None:
        self.target = target
        self.layer = layer
        self.depth = depth
        self.processor: Any = None
        self.calls = 0  # of this forward


class Target:
    """One transformer of the attachment and where its denoising stands.

    Attributes:
        name: the pipeline's component name.
        places: its attention modules, in the adapter's order.
    """

    def __init__(self, name: str, adapter: Adapter) -> None:
        self.name = name
        self.adapter = adapter
        self.places: list[Place] = []
        self.branch = "default"
        self.in_context = False
        self.told_step = False
        self.step_index: int | None = None
        self.sigma: float | None = None
        self.shapes: dict[str, tuple[tuple[int, ...], int]] = {}
        self.timestep = -math.inf
        self.calls_at_timestep = 0
        self.batch: int | None = None  # of this forward, where it is observed
        self.weights: Hashable = None


class Session:
    """All that an attachment remembers between attention calls.

    Args:
        handlers: the attached methods, in the order in which they fill the plan.
        backend: the kernel backend's name.
        scheduler: the pipeline's scheduler, asked for the number of steps where the pipeline does not tell; or None.
    """

    def __init__(self, handlers: Sequence[Handler], backend: str, scheduler: Any = None) -> None:
        self.number = next(_NUMBERS)
        self.handlers = tuple(handlers)
        self.backend = backend
        self.scheduler = scheduler
        self.targets: list[Target] = []
        self.places: list[Place] = []
        self.num_inference_steps: int | None = None
        self.recorder = Recorder()
        self._last_step: dict[tuple[str, str], int] = {}
        self._plans: deque[tuple[int, AttentionPlan]] = deque()
        self._plan_numbers = itertools.count()
        _SESSIONS[self.number] = self

    def reset(self) -> None:
        """Forget everything that belongs to one generation."""
        self._last_step.clear()
        self._plans.clear()
        self.recorder = Recorder()
        self.reset_handlers()
        for target in self.targets:
            target.shapes.clear()

    def reset_handlers(self) -> None:
        """Have every method forget its state."""
        for handler in self.handlers:
            handler.reset()

    def backend_report(self) -> str:
        """Return the backend asked for and, once a planned call ran, what it resolved to."""
        used = ", ".join(sorted(self.recorder.backends))
        return f"{self.backend} ({used})" if used and used != self.backend else self.backend

    def enter(self, target: Target, branch: str, context: Mapping[str, Any]) -> None:
        """Note that a denoising call begins: ``cache_context`` with what the pipeline tells it."""
        target.in_context = True
        target.branch = branch
        target.sigma = context.get("sigma")
        target.told_step = context.get("step_index") is not None
        if target.told_step:
            target.step_index = context["step_index"]
            self._begin_call(target, context.get("num_inference_steps"))

    def leave(self, target: Target) -> None:
        """Note that the denoising call ended, or was aborted."""
        target.in_context = target.told_step = False

    def observe(self, target: Target, grid: Sequence[int] | str, batch: int, timestep: Tensor | None) -> None:
        """Note the shape of a forward that begins, and its step where no context told it.

        Raises:
            ConfigError: if a method refuses the layout, or would thin out a forward that has none.
        """
        if not target.told_step:
            self._infer_step(target, timestep)
        if not isinstance(grid, str):
            self._note_shape(target, grid, batch)
        elif any(place.processor._dit_accel_sparse for place in target.places):
            raise ConfigError(f"{target.name} ({target.adapter.name}) can't be thinned out in this call: {grid}")
        _begin_forward(target, batch)

    def note_weights(self, target: Target, weights: Hashable) -> None:
        """Note what acts on the transformer's weights; the methods forget what they learned under another value."""
        if target.weights is not None and weights != target.weights:
            self.reset_handlers()
        target.weights = weights

    def plan(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        grid: Sequence[int],
        layout: str,
        differentiate: bool,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[AttentionPlan, Moment, int]:
        """Return the plan of the attention call that runs now, its moment and, for a backward, its number, else -1.

        Raises:
            ConfigError: if the tensors do not have the layout's length.
        """
        place = self.places[layer]
        target = place.target
        if tuple(grid) == NO_GRID:
            raise ConfigError(
                f"{target.name} ({target.adapter.name}) tells its tokens' places by values, which a transformer "
                "that is compiled whole does not give; compile its blocks (compile_repeated_blocks), or detach"
            )
        tokens, batch = _layout(grid), target.batch or q.shape[0]  # rows may be packed into one
        length = q.shape[1] if layout == "bshd" else q.shape[2]
        if target.adapter.ragged_text:
            tokens = _with_valid_text(tokens, length)
            _, batch = target.shapes.get(target.branch, (None, batch))
        if length != tokens.tokens:
            raise ConfigError(
                f"{target.name} layer {place.layer} attends over {length} tokens, the adapter {target.adapter.name!r} "
                f"reads {tokens.tokens} off the latents ({tokens}); check the adapter's grid: "
                "frames_axis, text, joined, the patch size"
            )
        self._note_shape(target, grid, batch)  # a forward that is compiled whole is not observed
        row, repeated = _which_call(place, q.shape[0])
        moment = Moment(
            transformer=target.name,
            layer=place.layer,
            depth=place.depth,
            branch=target.branch,
            step_index=target.step_index or 0,
            num_inference_steps=self.num_inference_steps,
            sigma=target.sigma,
            layout=tokens,
            batch=q.shape[0],
            device=q.device,
            row=row,
            repeated=repeated,
            differentiate=differentiate,
        )
        plan, call = AttentionPlan(), Call(q=q, k=k, mask=mask, layout=layout, scale=scale, backend=self.backend)
        for handler in self.handlers:
            if handler.is_active(moment.depth, moment.step_index, moment.num_inference_steps, moment.sigma):
                handler.look(plan, moment, call)
                plan = handler.contribute(plan, moment)
        return plan, moment, self._remember(plan) if differentiate else -1

    def plan_by_number(self, number: int) -> AttentionPlan:
        """Return a plan that `plan` gave out, for the backward.

        Raises:
            AttachError: if too many forwards ran in between.
        """
        for known, plan in self._plans:
            if known == number:
                return plan
        raise AttachError(
            f"the attention plan {number} of a forward is gone before its backward ran; "
            "run the backward before the next generation begins"
        )

    def execute(
        self,
        plan: AttentionPlan,
        moment: Moment,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        layout: str,
        scale: float | None,
    ) -> Tensor:
        """Run a plan in one kernel call, count what ran, let methods learn from it and correct it; outside autograd."""
        if mask is not None and self._stays_dense(moment, q, k, mask, layout):
            return attend_dense(q, k, v, mask, layout, scale)
        self.recorder.backends.add(resolve_backend(self.backend, q.device, q.dtype, q.shape[-1]))
        tiles, arguments = self._kernel_arguments(plan, q, k, mask, layout, scale)
        selection = plan.selection
        found = block_sparse_attention_eager(q, k, v, tiles, **arguments, return_tiles=selection is not None)
        if isinstance(found, Tensor):
            out = found
            self.recorder.sparse_call(moment, plan)
        else:
            assert selection is not None
            out = found[0]
            self.recorder.selected_call(moment, plan, found[1])
            if selection.vote is not None:
                for handler in self.handlers:
                    handler.learn(moment, found[2])
        call = Call(q=q, k=k, mask=mask, layout=layout, scale=scale, backend=self.backend)
        for handler in self.handlers:
            out, error = handler.correct(plan, moment, call, v, out)
            if error is not None:
                self.recorder.measured_call(moment, error)
        return out

    def gradients(
        self,
        plan: AttentionPlan,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        layout: str,
        scale: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v under a plan."""
        if mask is not None and not is_key_padding(mask, q, k, layout):
            dq, dk, dv = dense_gradients(grad, q, k, v, mask, layout, scale)
            return dq, dk, dv
        tiles, arguments = self._kernel_arguments(plan, q, k, mask, layout, scale)
        return block_sparse_attention_backward(grad, q, k, v, tiles, **arguments)

    def _stays_dense(self, moment: Moment, q: Tensor, k: Tensor, mask: Tensor, layout: str) -> bool:
        """Tell whether a mask that is no key padding keeps a call dense; the report says so."""
        place = moment.depth, moment.step_index, moment.num_inference_steps, moment.sigma
        if not all(handler.dense_under_masks for handler in self.handlers if handler.is_active(*place)):
            return False
        if is_key_padding(mask, q, k, layout):
            return False
        self.recorder.forward(moment.transformer, moment.branch, moment.step_index, 1)
        self.recorder.note(
            f"{moment.transformer} passes masks {mask.dtype} {list(mask.shape)} that are no key padding; such calls "
            "stayed dense"
        )
        return True

    def _kernel_arguments(
        self, plan: AttentionPlan, q: Tensor, k: Tensor, mask: Tensor | None, layout: str, scale: float | None
    ) -> tuple[TileLists, dict[str, Any]]:
        axis = 1 if layout == "bshd" else 2
        tiles = plan.tiles
        if tiles is None:
            tiles = TileLists.full(q.shape[axis], k.shape[axis], block_q=128, block_k=128).to(q.device)
        return tiles, {
            "layout": layout,
            "scale": scale,
            "head_scale": plan.head_scale,
            "key_mask": None if mask is None else key_padding(mask, q, k, layout),
            "frame_decay": plan.frame_decay,
            "token_order": plan.token_order,
            "identity_mix": plan.identity_mix,
            "selection": plan.selection,
            "backend": self.backend,
        }

    def _note_shape(self, target: Target, grid: Sequence[int], batch: int) -> None:
        """Let the methods see a new shape; drop their state if the branch had another one before."""
        shape = (tuple(int(size) for size in grid), batch)
        known = target.shapes.get(target.branch)
        if shape == known:
            return
        if known is not None:
            self.reset_handlers()
        target.shapes[target.branch] = shape
        layout = _layout(grid)
        for handler in self.handlers:
            if note := handler.check_layout(layout):
                self.recorder.note(note)

    def _remember(self, plan: AttentionPlan) -> int:
        number = next(self._plan_numbers)
        self._plans.append((number, plan))
        while len(self._plans) > 8 * len(self.places):
            self._plans.popleft()
        return number

    def _begin_call(self, target: Target, num_inference_steps: int | None) -> None:
        """Start a generation where the step did not advance, then switch each layer between dense and the plan."""
        step = target.step_index or 0
        key = (target.name, target.branch)
        if step <= self._last_step.get(key, -1) or num_inference_steps != self.num_inference_steps:
            self.reset()
        self._last_step[key] = step
        self.num_inference_steps = num_inference_steps
        dense = 0
        _begin_forward(target, None)
        for place in target.places:
            sparse = any(
                handler.is_active(place.depth, step, num_inference_steps, target.sigma) for handler in self.handlers
            )
            place.processor._dit_accel_sparse = sparse
            dense += not sparse
        self.recorder.forward(target.name, target.branch, step, dense)

    def _infer_step(self, target: Target, timestep: Tensor | None) -> None:
        """Count steps by the timesteps seen: a lower one is the next step, a higher one begins a generation."""
        value = noisiest(timestep, target.adapter.rising_timesteps)
        repeated = value == target.timestep and timestep is not None
        target.calls_at_timestep = target.calls_at_timestep + 1 if repeated else 0
        if not repeated:
            target.step_index = (target.step_index or 0) + 1 if value < target.timestep else 0
        target.timestep = value if timestep is not None else -math.inf
        if not target.in_context:
            target.branch = f"call {target.calls_at_timestep}"
        target.sigma = noise_level(self.scheduler)
        self._begin_call(target, step_count(self.scheduler))


def _layout(grid: Sequence[int]) -> TokenLayout:
    frames, height, width, before, after = (int(size) for size in grid)
    return TokenLayout(frames=frames, height=height, width=width, text_before=before, text_after=after)


def _with_valid_text(tokens: TokenLayout, length: int) -> TokenLayout:
    """Return the layout of a sequence that left out padded text, or all text; or the layout if that can't be."""
    if length == tokens.visual_tokens:
        return replace(tokens, text_before=0, text_after=0)
    dropped = tokens.tokens - length
    if not 0 <= dropped <= tokens.text_after:
        return tokens
    return replace(tokens, text_after=tokens.text_after - dropped)


def _begin_forward(target: Target, batch: int | None) -> None:
    target.batch = batch
    for place in target.places:
        place.calls = 0


def _which_call(place: Place, batch: int) -> tuple[int, bool]:
    """Count a call of ``batch`` rows; return its place among the forward's calls, and whether it ran before."""
    count, whole = place.calls, place.target.batch
    place.calls += 1
    if whole is None and place.target.adapter.ragged_text:  # how many rows follow is not known
        return count, False
    rows = max(1, (whole or batch) // batch)
    return count % rows, count >= rows
