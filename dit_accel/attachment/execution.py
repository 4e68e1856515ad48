"""Plans and runs the attention calls of one attachment: what its methods say together, in one kernel call.

The attention operator finds it by its number. Two attachments never share one.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from dit_accel_kernels import block_sparse_attention_backward, block_sparse_attention_eager
from torch import Tensor

from ..errors import AttachError, ConfigError
from ..methods.base import AttentionHandler, Corrects, Handler, ReadsVotes, StoresOutputs
from ..plan.call import Call, call_of
from ..plan.context import CallContext, StepContext
from ..plan.exact_rows import dense_rows, gradients_of_rows
from ..plan.layout import TokenLayout, layout_of, with_valid_text
from ..plan.masks import is_key_padding, visible_row
from ..plan.plan import AttentionPlan
from ..report.recorder import Recorder
from .backward import NO_TICKET, BackwardStore
from .kernel_call import backend_of, by_rows, computed_rows, followed, kernel_arguments, without_slow_lists
from .layers import AttentionLayer
from .observed import Observer, PlannedCall
from .state import DenoisingState
from .threads import OneThread

_EXECUTIONS: "weakref.WeakValueDictionary[int, Execution]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()

NO_GRID = (-1, -1, -1, 0, 0)
"""What a forward whose adapter gives no grid hands to its attention calls."""

_STEP_FIELDS = tuple(field.name for field in fields(StepContext))


def get(number: int) -> "Execution":
    """Return the execution that a compiled graph or processor refers to.

    Raises:
        AttachError: if its attachment is gone.
    """
    if number not in _EXECUTIONS:
        raise AttachError(f"attachment {number} is detached, but a processor of it still runs; attach again")
    return _EXECUTIONS[number]


class Execution:
    """Plans and runs the attention calls of one attachment.

    Args:
        handlers: the attached methods, in the order in which they act.
        backend: the kernel backend's name.
        pipe: the pipeline, or None.
    """

    def __init__(self, handlers: Sequence[Handler], backend: str, pipe: Any = None) -> None:
        self.number = next(_NUMBERS)
        self.backend = backend
        self.state = DenoisingState(pipe, self.begin_run, self.reset)
        self.threads = OneThread()
        self.layers: list[AttentionLayer] = []
        self.recorder = Recorder()
        self.backward = BackwardStore()
        self.observers: list[Observer] = []
        self.on_run: list[Callable[[], None]] = []
        self.runs = 0
        self.use(handlers)
        _EXECUTIONS[self.number] = self

    def use(self, handlers: Sequence[Handler]) -> None:
        """Let these be the methods from now on."""
        self.handlers = tuple(handlers)
        self.attention = tuple(one for one in handlers if isinstance(one, AttentionHandler))
        self._learners = tuple(one for one in handlers if isinstance(one, ReadsVotes))
        self._keepers = tuple(one for one in handlers if isinstance(one, StoresOutputs))
        self._correctors = tuple(one for one in handlers if isinstance(one, Corrects))

    def begin_run(self) -> None:
        """Forget everything that belongs to the last generation."""
        self.runs += 1
        for call in self.on_run:
            call()
        self.recorder = Recorder()
        self.threads.begin_run()
        for state in {layer.state for layer in self.layers}:
            state.begin_run()
        self.reset()
        for handler in self.handlers:
            handler.begin_run()

    def reset(self) -> None:
        """Have every method forget what it carries from step to step."""
        for handler in self.handlers:
            handler.reset()

    def acting(self, step: StepContext, depth: int) -> list[AttentionHandler]:
        """Return the methods that change attention in a layer at a step, over its layout where that is known."""
        return [
            handler
            for handler in self.attention
            if (step.layout is None or handler.applies(step.layout)) and handler.is_active(step, depth)
        ]

    def note_layout(self, layer: AttentionLayer, layout: TokenLayout, batch: int) -> bool:
        """Let the methods see a new shape, and tell whether it was one; drop their state if the branch had another."""
        state = layer.state
        known = state.layouts.get(state.branch)
        if known == (layout, batch):
            return False
        if known is not None:
            self.reset()
        state.layouts[state.branch] = layout, batch
        for handler in self.handlers:
            if note := handler.check_layout(layout):
                self.recorder.note(note)
        return True

    def attend(
        self,
        number: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        grid: Sequence[int],
        tokens_first: bool,
        scale: float | None,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        """Plan and run one attention call; return its output, as q lies, and the ticket for a backward.

        Raises:
            ConfigError: if the tensors do not have the layout's length, or a method refuses the call.
        """
        layer = self.layers[number]
        call, asked = self._call(layer, q, k, v, mask, grid, tokens_first, scale)
        context = self._context(layer, call, grid, differentiate)
        handlers = self.acting(context, layer.depth)
        if self._stays_dense(handlers, call, context):
            plan = AttentionPlan()
            out = self._run_dense(plan, call, layer)
        else:
            plan = self._plan(handlers, call, context)
            out, plan = self._run(plan, call, context, layer)
        ticket = self.backward.put(plan) if differentiate else torch.tensor(NO_TICKET)
        return call.as_held(out[:, :, asked])[0], ticket

    def gradients(
        self,
        number: int,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        ticket: Tensor,
        grid: Sequence[int],
        tokens_first: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v under the plan of a ticket, as they lie."""
        layer, plan = self.layers[number], self.backward.get(ticket)
        plan.require_gradient()
        call, asked = self._call(layer, q, k, v, mask, grid, tokens_first, scale)
        grad = call.heads_first(grad)
        if grad.shape[2] != call.tokens:
            grad = F.pad(grad, (0, 0, asked.start, call.tokens - asked.stop))
        if plan.needs_kernel:
            dq, dk, dv = self._kernel_gradients(plan, call, grad)
        else:
            dq, dk, dv = self._dense_gradients(plan, call, layer, grad)
        dq, dk, dv = call.as_held(dq[:, :, asked], dk, dv)
        return dq, dk, dv

    def _call(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        grid: Sequence[int],
        tokens_first: bool,
        scale: float | None,
    ) -> tuple[Call, slice]:
        """Return the call with a query for every token, and which of them are the model's own.

        Where only some tokens have queries (the image, or all behind text and cached keys), the others get zeros.
        """
        if mask is not None and layer.state.adapter.outer_masks:
            mask = visible_row(mask, grid[3])
        call = call_of(q, k, v, mask, scale, self.backend, tokens_first)
        asked, silent, start = call.q.shape[2], call.tokens - call.q.shape[2], 0
        if silent > 0:
            start = grid[3] if asked == grid[0] * grid[1] * grid[2] else silent
            call = replace(call, q=F.pad(call.q, (0, 0, start, silent - start)))
        return call, slice(start, start + asked)

    def _context(self, layer: AttentionLayer, call: Call, grid: Sequence[int], differentiate: bool) -> CallContext:
        """Return where the denoising of a call stands."""
        state, adapter = layer.state, layer.state.adapter
        if tuple(grid) == NO_GRID:
            raise ConfigError(
                f"{state.name} ({adapter.name}) reads its tokens' positions off tensor values, which can't be done in "
                "a transformer that is compiled whole; compile its blocks (compile_repeated_blocks), or detach"
            )
        whole = layout_of(grid)
        layout, batch = whole, state.batch or len(call.q)  # rows may be packed into one
        if adapter.ragged_text:
            layout = with_valid_text(whole, call.tokens)
            _, batch = state.layouts.get(state.branch, (None, batch))
        if call.tokens != layout.tokens:
            raise ConfigError(
                f"{state.name} layer {layer.index} attends over {call.tokens} tokens, but the adapter {adapter.name!r} "
                f"reads {layout.tokens} off the latents ({layout}); check the adapter's grid: frames_axis, text, "
                "joined, the patch size"
            )
        self.note_layout(layer, whole, batch)  # a forward that is compiled whole is not observed
        row, repeated = layer.which_call(len(call.q))
        step = self.state.context(state)
        told = {name: getattr(step, name) for name in _STEP_FIELDS if name not in ("layout", "batch")}
        return CallContext(
            **told, layout=layout, batch=len(call.q), layer=layer.index, depth=layer.depth, device=call.q.device,
            row=row, repeated=repeated, differentiate=differentiate,
            heads=state.ulysses.share(layer.heads) if state.ulysses else None,
        )  # fmt: skip

    def _plan(self, handlers: Sequence[AttentionHandler], call: Call, context: CallContext) -> AttentionPlan:
        """Return what the methods say together, each given what those before it said."""
        plan, by = AttentionPlan(), []
        for handler in handlers:
            try:
                plan = handler.plan(plan, call.with_keys(plan.centred(call.k)), context)
            except ConfigError as error:
                if not by:
                    raise
                raise ConfigError(f"{handler.name} together with {', '.join(by)}: {error}") from None
            by.append(handler.name)
        if context.differentiate or context.training or not all(handler.only_saves for handler in handlers):
            return plan
        return without_slow_lists(plan, call, context, self.recorder)

    def _run(
        self, plan: AttentionPlan, call: Call, context: CallContext, layer: AttentionLayer
    ) -> tuple[Tensor, AttentionPlan]:
        """Run a plan, count it, let methods learn from it and correct it; return the plan that a backward follows."""
        given, exact, planned = call, None, None
        if plan.reused is not None:
            out = plan.reused.out.clone()
            for own, part in by_rows(plan, call, out):
                self._run_rows(own, part, context, layer)
        elif plan.skips_logits or not plan.needs_kernel:
            out = self._run_dense(plan, call, layer)
            self.recorder.sparse_call(context, plan)
        else:
            call = call.with_keys(plan.centred(call.k))
            out, exact, kept = self._run_kernel(plan, call, context.differentiate)
            if exact is None:
                self.recorder.sparse_call(context, plan)
            else:
                self.recorder.selected_call(context, plan, exact)
            if kept is not None:
                for learner in self._learners:
                    learner.learn(context, kept)
            if self._correctors and self.observers:
                planned = out.clone()
            for corrector in self._correctors:
                out = corrector.correct(plan, call, context, out)
            if plan.row_override is not None:
                own = dense_rows(plan, call, plan.row_override.rows, plan.row_override.keys)
                for x in (out, planned):
                    if x is not None:
                        x.index_copy_(2, plan.row_override.rows, own)
        for keeper in self._keepers:
            keeper.keep(context, out)
        if plan.led is not None:
            planned = out if planned is None else planned
            out = plan.led.applied(out)
        self.show(PlannedCall(plan=plan, context=context, call=given, out=out, planned=planned, exact=exact))
        return out, plan if exact is None or not context.differentiate else followed(plan, exact)

    def show(self, call: PlannedCall) -> None:
        """Let the observers see a planned call."""
        for observer in tuple(self.observers):
            observer(call)

    def _run_rows(self, plan: AttentionPlan, call: Call, context: CallContext, layer: AttentionLayer) -> None:
        """Write the rows that a plan of `by_rows` computes, one smaller call, over what it reuses."""
        assert plan.reused is not None
        if not len(plan.reused.rows[0]):
            return self.recorder.sparse_call(context, plan, 0.0)
        cut, small, rows = computed_rows(plan, call)
        share = len(rows) * small.tokens / (call.q.shape[2] * call.tokens)
        if not cut.needs_kernel:
            found, exact = self._run_dense(cut, small, layer), None
        else:
            small = small.with_keys(cut.centred(small.k))
            found, exact, _ = self._run_kernel(cut, small)
        if exact is None:
            self.recorder.sparse_call(context, cut, share)
        else:
            self.recorder.selected_call(context, cut, exact, share)
        plan.reused.out.index_copy_(2, rows, found.to(plan.reused.out.dtype))

    def _run_kernel(
        self, plan: AttentionPlan, call: Call, differentiate: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the output [B, H, S, D], and of a selection the tiles that it left exact and those that votes keep."""
        tiles, arguments = kernel_arguments(plan, call)
        name = backend_of(plan, call, tiles, differentiate=differentiate)
        self.recorder.ran_by(name, call.q)
        arguments = {**arguments, "backend": name} if differentiate else arguments
        q, k, v = call.as_held(call.q, call.k, call.v)
        result = block_sparse_attention_eager(q, k, v, tiles, **arguments, return_tiles=plan.selection is not None)
        if isinstance(result, Tensor):
            return call.heads_first(result), None, None
        votes = plan.selection is not None and plan.selection.vote is not None
        return call.heads_first(result[0]), result[1], result[2] if votes else None

    def _run_dense(self, plan: AttentionPlan, call: Call, layer: AttentionLayer) -> Tensor:
        """Return the output of a plan that needs no kernel of ours, by the user's own dense attention."""
        if plan.skips_logits:
            return call.values()
        assert layer.dense is not None
        q = call.q
        if plan.head_scale is not None:
            q = (q * plan.head_scale.reshape(-1, q.shape[1])[:, :, None, None]).to(q.dtype)
        q, k, v = call.as_held(q, call.k, call.v)
        out = call.heads_first(layer.dense(q, k, v, call.mask, call.scale))
        weight = plan.value_share(out.shape[1], out.dtype)
        return out if weight is None else torch.lerp(out, call.values(), weight.expand_as(out))

    def _dense_gradients(
        self, plan: AttentionPlan, call: Call, layer: AttentionLayer, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v through the user's own attention.

        Raises:
            ConfigError: if its backend can't be differentiated inside an operator, where autograd records nothing.
        """
        try:
            of_call = torch.func.vjp(
                lambda q, k, v: self._run_dense(plan, replace(call, q=q, k=k, v=v), layer), call.q, call.k, call.v
            )
            return of_call[1](grad)
        except RuntimeError as error:
            raise ConfigError(
                f"the attention backend set on {layer.state.name} has no gradient that a planned call could use "
                f"({error}); set another one, such as 'native', to train with these methods"
            ) from error

    def _kernel_gradients(self, plan: AttentionPlan, call: Call, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        call = call.with_keys(plan.centred(call.k))
        tiles, arguments = kernel_arguments(plan, call)
        rows = plan.row_override
        others = grad if rows is None else grad.index_fill(2, rows.rows, 0)
        others, q, k, v = call.as_held(others, call.q, call.k, call.v)
        grads = tuple(map(call.heads_first, block_sparse_attention_backward(others, q, k, v, tiles, **arguments)))
        if rows is not None:
            of_rows = gradients_of_rows(plan, call, grad, rows.rows, rows.keys)
            grads = tuple(one + other for one, other in zip(grads, of_rows, strict=True))
        return grads[0], plan.gradient_before_centring(grads[1], call.key_mask()), grads[2]

    def _stays_dense(self, handlers: Sequence[AttentionHandler], call: Call, context: CallContext) -> bool:
        """Tell whether a mask that is not key padding keeps a call dense; the report says so."""
        mask = call.mask
        if mask is None or not handlers or not all(handler.dense_under_masks for handler in handlers):
            return False
        if is_key_padding(mask, call.q, call.k):
            return False
        self.recorder.forward(context.transformer, context.branch, context.step_index, 1)
        self.recorder.note(
            f"{context.transformer} passes masks {mask.dtype} {list(mask.shape)} that are not key padding; such calls "
            "stayed dense"
        )
        return True
