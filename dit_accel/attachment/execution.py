"""Plans and runs the attention calls of one attachment: what its methods say together, in one kernel call.

The attention operator finds it by its number. Two attachments never share one.
"""

import functools
import itertools
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from dit_accel_kernels import block_sparse_attention_eager
from torch import Tensor

from ..adapters.adapter import Grid
from ..errors import AttachError, ConfigError
from ..methods.base import AttentionHandler, Corrects, Handler, Phase, ReadsVotes, StoresOutputs
from ..plan.call import Call, call_of
from ..plan.context import CallContext, StepContext
from ..plan.layout import TokenLayout
from ..plan.masks import visible_row
from ..plan.plan import AttentionPlan, Launched
from ..plan.rests import Rests
from ..report.recorder import Recorder
from .backward import BackwardStore, Differentiated, dense_gradients, kernel_gradients
from .beside import Ran
from .forward_state import NO_GRID, ForwardState
from .kernel_call import (
    by_rows,
    override_rows,
    run_dense,
    run_own_rows,
    run_rows,
    stays_dense,
    without_slow_lists,
)
from .layers import AttentionLayer, TransformerState, shortened
from .observed import Observer, PlannedCall
from .rest import run_turn, turned
from .state import DenoisingState
from .threads import OneThread

_EXECUTIONS: "weakref.WeakValueDictionary[int, Execution]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def get(number: int) -> "Execution":
    """Return the execution that a compiled graph or processor refers to; `AttachError` if it is detached."""
    if number not in _EXECUTIONS:
        raise AttachError(f"attachment {number} is detached, but a processor of it still runs; attach again")
    return _EXECUTIONS[number]


class Execution:
    """Plans and runs the attention calls of one attachment.

    Args:
        handlers: the attached methods, in the order in which they act.
        backend: the kernel backend's name.
        pipe: the pipeline, or None.
        dense: what computes dense attention: ``user``, or ``auto`` for the faster on a CPU.
    """

    def __init__(self, handlers: Sequence[Handler], backend: str, pipe: Any = None, dense: str = "user") -> None:
        self.number = next(_NUMBERS)
        self.backend, self.dense = backend, dense
        self.forward = ForwardState()
        self.state = DenoisingState(pipe, self.forward, self.begin_run, self.reset)
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
        self._takes_turns = any(one.rests is not None for one in self.attention)
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
        for handler in self.attention:
            if handler.rests is not None:
                handler.rests.reset()

    def acting(self, step: StepContext, depth: int) -> tuple[AttentionHandler, ...]:
        """Return the methods that change attention in a layer at a step, over its layout where that is known."""
        return tuple(
            handler
            for handler in self.attention
            if (step.layout is None or handler.applies(step.layout)) and handler.is_active(step, depth)
        )

    def switch(self, state: TransformerState) -> None:
        """Ask which methods act in each layer of the forward that begins, and switch the processors by that.

        Where the forward's layout is not known it is taken to be that of the branch's last one; where there was none,
        or forwards are not seen to begin, every method is taken to act on it.
        """
        known, _ = (None, 0) if state.unseen else state.layouts.get(state.branch, (None, 0))
        forward, step = self.forward, replace(self.state.context(state), layout=known)
        if forward.step is None or replace(forward.step, batch=step.batch) != step:  # else set when the context began
            forward.acting = {layer: self.acting(step, layer.depth) for layer in state.layers}
            forward.switch()
        forward.step = step

    def note_layout(self, state: TransformerState, layout: TokenLayout, batch: int) -> None:
        """Let the methods see the shape of a forward if it is a new one; drop their state if the branch had another."""
        known = state.layouts.get(state.branch)
        if known == (layout, batch):
            return
        if known is not None:
            self.reset()
        state.layouts[state.branch] = layout, batch
        for handler in self.handlers:
            if note := handler.check_layout(layout):
                self.recorder.note(note)

    def attend(self, number: int, call: Call, sizes: Grid, differentiate: bool = False) -> tuple[Tensor, Tensor | None]:
        """Plan and run one attention call; return its output, as q lies, contiguous, and the ticket for a backward.

        Args:
            number: the layer's.
            call: q, k and v as the model has them; fewer queries than keys where only some tokens have any.
            sizes: the grid of the sequence.
            differentiate: a backward follows.
        """
        layer, forward, clock = self.layers[number], self.forward, self.recorder.clock
        begin = None if clock.parts is None else clock.stamp(call.q.device)
        if sizes != forward.noted:
            self._note_unseen(layer.state, sizes, len(call.q))
        if forward.shards is not None and forward.shards.rows is not None:
            if differentiate:
                raise ConfigError(
                    "methods on attention have no gradient under ring attention; train with ContextParallelConfig("
                    "ulysses_degree=...)"
                )
            call = replace(call, rows=forward.shards.rows)
        call, given = self._completed(layer, call, sizes)
        layout, (frames, height, width, before, after) = forward.layout, sizes
        if (keys := call.k.shape[2]) != before + frames * height * width + after:
            layout = shortened(layer, layout, keys)
        handlers = forward.acting.get(layer) if layout is forward.layout else None
        if handlers is None:
            handlers = self._ask(layer, layout)
        context = self._context(layer, layout, call, differentiate)
        made, rests = layer.state.made, None
        found = None
        if context.beside is not None:
            found = made.find(context, forward.batch or context.batch, call.q.shape[1])
        base = found or Ran(plan=AttentionPlan(), batch=context.batch, handlers=handlers)
        if found is None and call.mask is not None and stays_dense(handlers, call, context, self.recorder):
            plan, out = base.plan, run_dense(base.plan, call, layer)
            if made.wanted:
                made.note(context, forward.batch or context.batch, base)
        else:
            planning = time.perf_counter()
            if found is None:
                own = tuple(one for one in handlers if one.phase is not Phase.GUIDANCE)
                if self._takes_turns:
                    rests, context = turned(own, context)
                base = Ran(plan=self._plan(own, call, context), batch=context.batch, handlers=own)
            plan, others = base.plan, [one for one in handlers if one not in base.handlers]
            if others:
                plan = self._plan(others, call, context, base)
            clock.lists += time.perf_counter() - planning
            out, plan = self._run(plan, call, context, layer, rests, base, found is not None)
        ticket = None
        if differentiate:
            ticket = self.backward.put(Differentiated(plan, number, sizes, call.tokens_first, call.scale))
        out = out if given is None else out[:, :, given]
        if begin is not None:
            clock.add_part("attention", begin, call.q.device)
        return (out.transpose(1, 2) if call.tokens_first else out).contiguous(), ticket

    def gradients(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v under the plan of a ticket, as they lie, contiguous."""
        forward = self.backward.get(ticket)
        layer, plan = self.layers[forward.layer], forward.plan
        if plan.guidance is not None:
            raise ConfigError("attention that is guided away from a negative text has no gradient; detach nag to train")
        if plan.queries is not None:
            raise ConfigError("attention of other queries than the model's has no gradient; detach seg to train")
        call = call_of(q, k, v, mask, forward.scale, self.backend, forward.tokens_first)
        call, given = self._completed(layer, call, forward.sizes)
        grad = call.heads_first(grad)
        if given is not None:
            grad = F.pad(grad, (0, 0, given.start, call.tokens - given.stop))
        if plan.needs_kernel:
            dq, dk, dv = kernel_gradients(plan, call, grad)
        else:
            dq, dk, dv = dense_gradients(plan, call, layer, grad)
        dq, dk, dv = call.as_held(dq if given is None else dq[:, :, given], dk, dv)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()

    def _note_unseen(self, state: TransformerState, sizes: Grid, rows: int) -> None:
        """Let the methods see a forward whose beginning nobody saw: of a transformer that is compiled whole."""
        if sizes == NO_GRID:
            raise ConfigError(
                f"{state.name} ({state.adapter.name}) reads its tokens' positions off tensor values, which can't be "
                "done in a transformer that is compiled whole; compile its blocks (compile_repeated_blocks), or detach"
            )
        forward = self.forward
        forward.lay(sizes)
        assert forward.layout is not None
        batch = forward.batch or rows
        if state.adapter.variable_text_length:  # rows may be packed into one
            _, batch = state.layouts.get(state.branch, (None, batch))
        self.note_layout(state, forward.layout, batch)
        forward.noted = sizes
        if forward.step is not None and forward.step.layout != forward.layout:
            forward.step, forward.acting = None, {}

    def _completed(self, layer: AttentionLayer, call: Call, sizes: Grid) -> tuple[Call, slice | None]:
        """Return the call with a query for every token, and which of them are the model's own; None: all, or `rows`.

        Where only some tokens have queries (the image, or all behind text and cached keys), the others get zeros.
        """
        frames, height, width, before, _ = sizes
        if call.mask is not None and layer.state.adapter.outer_masks:
            call = replace(call, mask=visible_row(call.mask, before))
        queries, missing = call.q.shape[2], call.tokens - call.q.shape[2]
        if missing <= 0 or call.rows is not None:
            return call, None
        start = before if queries == frames * height * width else missing
        return replace(call, q=F.pad(call.q, (0, 0, start, missing - start))), slice(start, start + queries)

    def _ask(self, layer: AttentionLayer, layout: TokenLayout | None) -> tuple[AttentionHandler, ...]:
        """Ask which methods act in a layer of the running forward, over a layout that may be a call's own."""
        forward = self.forward
        if forward.step is None:
            forward.step = self.state.context(layer.state)
        if layout is not forward.layout:
            return self.acting(replace(forward.step, layout=layout), layer.depth)
        handlers = forward.acting[layer] = self.acting(forward.step, layer.depth)
        return handlers

    def _context(
        self, layer: AttentionLayer, layout: TokenLayout | None, call: Call, differentiate: bool
    ) -> CallContext:
        """Return where the denoising of a call stands, and count it."""
        forward, step, batch = self.forward, self.forward.step, len(call.q)
        assert step is not None
        assert layout is not None
        row = count = forward.calls[layer]
        forward.calls[layer] += 1
        if (
            forward.batch is not None or not layer.state.adapter.variable_text_length
        ):  # else it is not known how many follow
            row %= max(1, (forward.batch or batch) // batch)
        return CallContext(
            transformer=step.transformer, branch=step.branch, step_index=step.step_index,
            num_inference_steps=step.num_inference_steps, sigma=step.sigma, noise=step.noise, training=step.training,
            tells_step=step.tells_step, layout=layout, batch=batch, layer=layer.index, depth=layer.depth,
            device=call.q.device, row=row, repeated=row != count, differentiate=differentiate,
            heads=None if forward.shards is None else forward.shards.share(layer.heads), beside=step.beside,
            rows=step.rows,
        )  # fmt: skip

    def _plan(
        self, handlers: Sequence[AttentionHandler], call: Call, context: CallContext, base: Ran | None = None
    ) -> AttentionPlan:
        """Return what methods say together, each given what those before it said; guidance adds to a ``base``."""
        plan, whole = AttentionPlan() if base is None else base.plan, call if call.rows is None else call.for_planning()
        for index, handler in enumerate(handlers):
            seen = whole if plan.key_mean is None else whole.with_keys(plan.centred(call.k))
            try:
                plan = handler.plan(plan, seen, context)
            except ConfigError as error:
                before = (*(() if base is None else base.handlers), *handlers[:index])
                if not before:
                    raise
                others = ", ".join(other.name for other in before)
                raise ConfigError(f"{handler.name} together with {others}: {error}") from None
        if base is not None:
            return plan
        if (asking := next((one for one in handlers if one.precision is not None), None)) is not None:
            if context.differentiate:
                raise ConfigError(
                    f"{asking.name}.precision = {asking.precision!r} has no gradient; leave it out to train"
                )
            return replace(plan, precision=asking.precision)
        if call.backend != "auto" or context.differentiate or context.training:
            return plan
        return without_slow_lists(plan, call, context, self.recorder) if all(x.only_saves for x in handlers) else plan

    def _run(
        self, plan: AttentionPlan, call: Call, context: CallContext, layer: AttentionLayer, rests: Rests | None,
        base: Ran, beside: bool,
    ) -> tuple[Tensor, AttentionPlan]:  # fmt: skip
        """Run a plan, count it, let methods learn from it and correct it; return the plan that a backward follows.

        ``base`` is what it adds guidance to; ``beside`` another call, which ran by that, it runs as that one did, and
        methods take no note.
        """
        given, planned, launched, turn, how = call, None, Launched(call.q), base.turn, base.corrections
        if context.turn == "dense" and rests is not None and not rests.cached:
            plan = plan.whole()
        if beside and plan.only_values and plan.row_override is None:  # V is all that is left of it
            plan = replace(plan, tiles=None, token_order=None, selection=None)
        call = call if plan.queries is None else replace(call, q=plan.queries)
        if plan.reused is not None and call.rows is None:
            out = plan.reused.out.clone()
            for part_plan, part in by_rows(plan, call, out):
                run_rows(part_plan, part, context, layer, self.recorder, run_kernel)
        elif plan.skips_logits or not plan.needs_kernel:
            out = run_dense(plan, call, layer)
            self.recorder.planned_call(context, plan)
        else:
            if plan.key_mean is not None:
                call = call.with_keys(plan.centred(call.k))
            if call.rows is not None:
                launched = Launched(run_own_rows(plan, call, layer, self.recorder, run_kernel))
            elif plan.tiles is not None and (turn is not None or (rests is not None and rests.cached)):
                launch = functools.partial(run_kernel, call=call, recorder=self.recorder, lse=True)
                launched, plan, turn = run_turn(plan, call, context, rests, turn, launch)
            else:
                launched = run_kernel(plan, call, self.recorder, context.differentiate)
            out = launched.out
            self.recorder.planned_call(context, plan, launched.exact)
            if launched.kept is not None:
                for learner in self._learners:
                    learner.learn(context, launched.kept)
            if (how or self._correctors) and self.observers:
                planned = out.clone()
            for one in how:
                out = one.applied(plan, call, out)
            for corrector in () if beside else self._correctors:
                out, one = corrector.correct(plan, call, context, out)
                how += () if one is None else (one,)
            if plan.row_override is not None:
                override_rows(plan, call, *(x for x in (out, planned) if x is not None))
        if not beside:
            for keeper in self._keepers:
                keeper.keep(context, out)
            if layer.state.made.wanted:
                ran = base.ended(plan, launched.exact, turn, how)
                layer.state.made.note(context, self.forward.batch or context.batch, ran)
        if plan.guidance is not None:
            planned = out if planned is None else planned
            out = plan.guidance.applied(out, call.rows)
        if self.observers:
            seen = PlannedCall(plan=plan, context=context, call=given, out=out, planned=planned, exact=launched.exact)
            for observer in tuple(self.observers):
                observer(seen)
        return out, plan if launched.exact is None or not context.differentiate else plan.followed(launched.exact)


def run_kernel(
    plan: AttentionPlan, call: Call, recorder: Recorder, differentiate: bool = False, lse: bool = False
) -> Launched:
    """Run a plan's kernel call, with its log-sum-exp if that is wanted; the keys are centred already."""
    tiles, arguments = plan.kernel_arguments(call)
    name = plan.backend(call, tiles, differentiate or lse)
    arguments = {**arguments, "backend": name} if differentiate else arguments
    q, k, v = call.as_held(call.q, call.k, call.v)
    selects = plan.selection is not None
    result = block_sparse_attention_eager(q, k, v, tiles, **arguments, return_tiles=selects, return_lse=lse)
    recorder.ran_by(name, call.q, plan.precision)
    out, *others = (result,) if isinstance(result, Tensor) else result
    found = others.pop(0) if lse else None
    exact = others.pop(0) if selects else None
    return Launched(call.heads_first(out), exact, others.pop(0) if others else None, found)
