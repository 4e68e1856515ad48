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

from ..errors import AttachError, ConfigError
from ..methods.base import Handler
from ..plan.exact_rows import dense_rows, gradients_of_rows
from ..plan.layout import TokenLayout
from ..plan.masks import attend_dense, dense_gradients, is_key_padding, key_padding
from ..plan.plan import AttentionPlan, Call, CallContext
from ..report.report import Recorder
from .layers import AttentionLayer as AttentionLayer
from .layers import TransformerState, begin_forward, layout_of, which_call, with_valid_text
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
        self.targets: list[TransformerState] = []
        self.places: list[AttentionLayer] = []
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

    def enter(self, target: TransformerState, branch: str, context: Mapping[str, Any]) -> None:
        """Note that a denoising call begins: ``cache_context`` with what the pipeline tells it."""
        target.in_context = True
        target.branch = branch
        target.sigma = context.get("sigma")
        target.told_step = context.get("step_index") is not None
        if target.told_step:
            target.step_index = context["step_index"]
            self._begin_call(target, context.get("num_inference_steps"))

    def leave(self, target: TransformerState) -> None:
        """Note that the denoising call ended, or was aborted."""
        target.in_context = target.told_step = False

    def observe(self, target: TransformerState, grid: Sequence[int] | str, batch: int, timestep: Tensor | None) -> None:
        """Note the shape of a forward that begins, and its step where no context told it.

        Raises:
            ConfigError: if a method refuses the layout, or would thin out a forward that has none.
        """
        if not target.told_step:
            self._infer_step(target, timestep)
        if not isinstance(grid, str):
            if self._note_shape(target, grid, batch):
                self._switch(target)
        elif any(place.processor._dit_accel_sparse for place in target.places):
            raise ConfigError(f"{target.name} ({target.adapter.name}) can't be thinned out in this call: {grid}")
        begin_forward(target, batch)

    def note_weights(self, target: TransformerState, weights: Hashable) -> None:
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
    ) -> tuple[AttentionPlan, CallContext, int]:
        """Return the plan of the attention call that runs now, its context and, for a backward, its number, else -1.

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
        tokens, batch = layout_of(grid), target.batch or q.shape[0]  # rows may be packed into one
        length = q.shape[1] if layout == "bshd" else q.shape[2]
        if target.adapter.ragged_text:
            tokens = with_valid_text(tokens, length)
            _, batch = target.shapes.get(target.branch, (None, batch))
        if length != tokens.tokens:
            raise ConfigError(
                f"{target.name} layer {place.layer} attends over {length} tokens, the adapter {target.adapter.name!r} "
                f"reads {tokens.tokens} off the latents ({tokens}); check the adapter's grid: "
                "frames_axis, text, joined, the patch size"
            )
        self._note_shape(target, grid, batch)  # a forward that is compiled whole is not observed
        row, repeated = which_call(place, q.shape[0])
        context = CallContext(
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
        for handler in self._acting(context.depth, context.step_index, context.sigma, tokens):
            if plan.key_mean is not None and call.k is k:  # all look at the same keys
                call = replace(call, k=plan.centred(k))
            handler.look(plan, context, call)
            plan = handler.contribute(plan, context)
        return plan, context, self._remember(plan) if differentiate else -1

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
        context: CallContext,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        layout: str,
        scale: float | None,
    ) -> Tensor:
        """Run a plan in one kernel call, count what ran, let methods learn from it and correct it; outside autograd."""
        if mask is not None and self._stays_dense(context, q, k, mask, layout):
            return attend_dense(q, k, v, mask, layout, scale)
        self.recorder.backends.add(resolve_backend(self.backend, q.device, q.dtype, q.shape[-1]))
        k = plan.centred(k)
        tiles, arguments = self._kernel_arguments(plan, q, k, mask, layout, scale)
        selection = plan.selection
        found = block_sparse_attention_eager(q, k, v, tiles, **arguments, return_tiles=selection is not None)
        if isinstance(found, Tensor):
            out = found
            self.recorder.sparse_call(context, plan)
        else:
            assert selection is not None
            out = found[0]
            self.recorder.selected_call(context, plan, found[1])
            if selection.vote is not None:
                for handler in self.handlers:
                    handler.learn(context, found[2])
            if context.differentiate:
                self._remember_tiles(plan, found[1])
        call = Call(q=q, k=k, mask=mask, layout=layout, scale=scale, backend=self.backend)
        for handler in self.handlers:
            out, error = handler.correct(plan, context, call, v, out)
            if error is not None:
                self.recorder.measured_call(context, error)
        if plan.row_override is not None:
            axis = 2 if layout == "bhsd" else 1
            out.index_copy_(
                axis, plan.row_override.rows, dense_rows(plan, call, v, plan.row_override.rows, plan.row_override.keys)
            )
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
        k = plan.centred(k)
        tiles, arguments = self._kernel_arguments(plan, q, k, mask, layout, scale)
        call = Call(q=q, k=k, mask=mask, layout=layout, scale=scale, backend=self.backend)
        if plan.row_override is None:
            grads = block_sparse_attention_backward(grad, q, k, v, tiles, **arguments)
        else:
            axis, rows = 2 if layout == "bhsd" else 1, plan.row_override.rows
            others = block_sparse_attention_backward(grad.index_fill(axis, rows, 0), q, k, v, tiles, **arguments)
            apart = gradients_of_rows(plan, call, v, grad, rows, plan.row_override.keys)
            grads = tuple(one + other for one, other in zip(others, apart, strict=True))
        return grads[0], plan.gradient_before_centring(grads[1], call), grads[2]

    def _stays_dense(self, context: CallContext, q: Tensor, k: Tensor, mask: Tensor, layout: str) -> bool:
        """Tell whether a mask that is no key padding keeps a call dense; the report says so."""
        acting = self._acting(context.depth, context.step_index, context.sigma, context.layout)
        if not all(handler.dense_under_masks for handler in acting):
            return False
        if is_key_padding(mask, q, k, layout):
            return False
        self.recorder.forward(context.transformer, context.branch, context.step_index, 1)
        self.recorder.note(
            f"{context.transformer} passes masks {mask.dtype} {list(mask.shape)} that are no key padding; such calls "
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

    def _note_shape(self, target: TransformerState, grid: Sequence[int], batch: int) -> bool:
        """Let the methods see a new shape, and tell if it was one; drop their state if the branch had another one."""
        shape = (tuple(int(size) for size in grid), batch)
        known = target.shapes.get(target.branch)
        if shape == known:
            return False
        if known is not None:
            self.reset_handlers()
        target.shapes[target.branch] = shape
        layout = layout_of(grid)
        for handler in self.handlers:
            if note := handler.check_layout(layout):
                self.recorder.note(note)
        return True

    def _remember(self, plan: AttentionPlan) -> int:
        number = next(self._plan_numbers)
        self._plans.append((number, plan))
        while len(self._plans) > 8 * len(self.places):
            self._plans.popleft()
        return number

    def _remember_tiles(self, plan: AttentionPlan, exact: Tensor) -> None:
        """Let a plan's backward follow the tiles that its forward found, instead of routing and voting once more."""
        selection = plan.selection
        assert selection is not None
        routed = None if selection.routing is None else exact
        selection = replace(selection, routing=None, vote=None, routed=routed)
        followed = replace(plan, selection=selection)
        self._plans = deque((number, followed if known is plan else known) for number, known in self._plans)

    def _begin_call(self, target: TransformerState, num_inference_steps: int | None) -> None:
        """Start a generation where the step did not advance, then switch the layers."""
        step = target.step_index or 0
        key = (target.name, target.branch)
        if step <= self._last_step.get(key, -1) or num_inference_steps != self.num_inference_steps:
            self.reset()
        self._last_step[key] = step
        self.num_inference_steps = num_inference_steps
        begin_forward(target, None)
        target.dense = 0
        self._switch(target)

    def _switch(self, target: TransformerState) -> None:
        """Switch each layer of a forward between dense and the plan, and count the dense ones.

        Where the forward's shape is not known yet, every method is taken to act on it.
        """
        shape = target.shapes.get(target.branch)
        layout, step, dense = None if shape is None else layout_of(shape[0]), target.step_index or 0, 0
        for place in target.places:
            sparse = bool(self._acting(place.depth, step, target.sigma, layout))
            place.processor._dit_accel_sparse = sparse
            dense += not sparse
        self.recorder.forward(target.name, target.branch, step, dense - target.dense)
        target.dense = dense

    def _acting(self, depth: int, step: int, sigma: float | None, layout: TokenLayout | None) -> list[Handler]:
        """Return the methods that change attention in a layer at a step, over a layout where it is known."""
        return [
            handler
            for handler in self.handlers
            if (layout is None or handler.applies(layout))
            and handler.is_active(depth, step, self.num_inference_steps, sigma)
        ]

    def _infer_step(self, target: TransformerState, timestep: Tensor | None) -> None:
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
