"""The engine of one attachment: plans and runs its attention calls, what all methods say together in one kernel call.

Who drives a model is a host, the wrapper around diffusers' forwards or ComfyUI's nodes: it calls `Engine.begin_run`,
`begin_forward`, `attend`, `end_forward` and `end_run`. Two attachments never share an engine.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import replace

from dit_accel_kernels import backend_of_last_call, block_sparse_attention_eager
from torch import Tensor, nn

from ..adapters.adapter import Adapter, Grid
from ..errors import ConfigError
from ..methods.base import AttentionHandler, Handler, OutputStep, Phase
from ..plan.call import Call
from ..plan.context import CallContext, StepContext
from ..plan.layout import TokenLayout
from ..plan.plan import AttentionPlan, KernelResult
from ..plan.rests import Rests
from ..report.recorder import Recorder
from .backward import BackwardStore, Differentiated
from .beside import RunFacts, Turn
from .forward_state import NO_GRID, ForwardState
from .kernel_call import (
    override_rows,
    run_dense,
    run_own_rows,
    run_reusing,
    run_turn,
    stays_dense,
    turned,
    without_slow_lists,
)
from .layers import AttentionLayer, Observer, PlannedCall, TransformerState, shortened
from .op import register


class Engine:
    """Plans and runs the attention calls of one attachment; ``dense`` as `attach` has it."""

    def __init__(self, handlers: Sequence[Handler], backend: str, dense: str = "user") -> None:
        self.number = register(self)
        self.backend, self.dense = backend, dense
        self.forward = ForwardState()  # what is known of the forward that runs
        # component name -> the transformer, of all that the host has added
        self.transformers: dict[str, TransformerState] = {}
        self.layers: list[AttentionLayer] = []  # their attention layers, by number
        self.recorder = Recorder()  # counts what runs; another one for each run
        self.backward = BackwardStore()
        self.observers: list[Observer] = []  # called with every planned call
        self.use(handlers)

    def use(self, handlers: Sequence[Handler]) -> None:
        """Let these be the methods from now on."""
        self.handlers = tuple(handlers)
        self.attention = tuple(handler for handler in handlers if isinstance(handler, AttentionHandler))
        self._takes_turns = any(handler.rests is not None for handler in self.attention)
        self._precise = frozenset(handler for handler in self.attention if handler.precision is not None)
        # rows under a rule of their own replace corrected ones; what is kept for later steps has both
        steps = [handler for handler in handlers if isinstance(handler, OutputStep)]
        early, late = (
            [step.after for step in steps if (step.phase > Phase.CORRECTIONS) is late] for late in (False, True)
        )
        self._steps = (*early, overridden, *late, guided)
        self._corrects = any(step.phase is Phase.CORRECTIONS for step in steps)

    def add_transformer(self, name: str, module: nn.Module, adapter: Adapter) -> TransformerState:
        """Let the methods act on a transformer."""
        state = self.transformers[name] = TransformerState(name, module, adapter)
        return state

    def add_layer(self, transformer: str, heads: int) -> AttentionLayer:
        """Return a new layer behind those of a transformer whose layers are met only as they run."""
        number = len(self.layers)
        self.layers.append(AttentionLayer(self.transformers[transformer], None, number, number, heads))
        return self.layers[-1]

    def begin_run(self) -> None:
        """Forget everything that belongs to the last generation."""
        self.recorder = Recorder()
        for transformer in self.transformers.values():
            transformer.begin_run()
        self.reset()
        for handler in self.handlers:
            handler.begin_run()

    def end_run(self) -> None:
        """Free what methods keep from step to step, and read the counts that still wait on the device."""
        self.recorder.settle()
        self.reset()

    def reset(self) -> None:
        """Have every method forget what it carries from step to step."""
        for handler in self.handlers:
            handler.reset()
        for handler in self.attention:
            if handler.rests is not None:
                handler.rests.reset()

    def expect_forward(self, step: StepContext, unseen: bool) -> None:
        """Switch the layers for a forward whose beginning may lie inside a compiled graph, where nobody sees it.

        Its layout is taken to be that of the branch's last one; where that began unseen too, all methods act on it.
        """
        self.forward.begin(None)
        transformer = self.transformers[step.transformer]
        known = None if unseen else transformer.last_layout(step.branch)
        self._switch(transformer, replace(step, layout=known, batch=None))
        self.forward.expected = True

    def begin_forward(self, step: StepContext, layout: TokenLayout | None, batch: int | None) -> None:
        """Begin a forward: ask who acts in each layer, switch the processors by that, and count it.

        ``layout`` and ``batch``, the rows, are None where the first attention call tells them.
        """
        forward, transformer = self.forward, self.transformers[step.transformer]
        forward.begin(batch)
        if layout is not None and batch is not None:
            self._note_layout(transformer, step.branch, layout, batch)
            forward.noted = forward.sizes
        self._switch(transformer, replace(step, layout=transformer.last_layout(step.branch), batch=batch))
        self.recorder.forwards_run += 1
        self.count_dense(step)

    def end_forward(self, ran: bool = True) -> None:
        """Forget how the calls of a forward ran, which those of forwards beside it followed.

        ``ran`` is False where what lies further in skipped the forward after it began.
        """
        self.recorder.forwards_run -= not ran
        for transformer in self.transformers.values():
            transformer.made.clear()

    def count_dense(self, step: StepContext) -> None:
        """Count a forward and the layers of it that stay dense."""
        dense = sum(not layer.processor._dit_accel_sparse for layer in self.transformers[step.transformer].layers)
        self.recorder.forward(step.transformer, step.branch, step.step_index, dense)

    def acting(self, step: StepContext, depth: int) -> tuple[AttentionHandler, ...]:
        """Return the methods that change attention in a layer at a step, over its layout where that is known."""
        return tuple(
            handler
            for handler in self.attention
            if (step.layout is None or handler.applies(step.layout)) and handler.is_active(step, depth)
        )

    def acts(self, layer: AttentionLayer, sizes: Grid, rows: int) -> bool:
        """Tell whether any method changes a call of ``rows`` batch rows in a layer of the running forward."""
        if sizes != self.forward.noted:
            self._note_unseen(layer.state, sizes, rows)
        return bool(self._acting(layer, self.forward.layout))

    def attend(
        self, layer: AttentionLayer, call: Call, sizes: Grid, differentiate: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Plan and run one attention call; return its output, as q lies, contiguous, and the ticket for a backward.

        The call has fewer queries than keys where only some tokens have any.
        """
        forward, clock = self.forward, self.recorder.clock
        begin = None if clock.parts is None else clock.stamp(call.q.device)
        if sizes != forward.noted:
            self._note_unseen(layer.state, sizes, len(call.q))
        if forward.shards is not None:
            call = forward.shards.own_queries(call, differentiate)
        call, rows = call.completed(sizes, layer.state.adapter.outer_masks)
        layout, (frames, height, width, before, after) = forward.layout, sizes
        if (keys := call.k.shape[2]) != before + frames * height * width + after:
            layout = shortened(layer, layout, keys)
        handlers = self._acting(layer, layout)
        out, plan = self._attend(layer, call, self._context(layer, layout, call, differentiate), handlers)
        ticket = None
        if differentiate:
            ticket = self.backward.put(Differentiated(plan, layer, sizes, call.tokens_first, call.scale))
        out = out if rows is None else out[:, :, rows]
        if begin is not None:
            clock.add_part("attention", begin, call.q.device)
        return (out.transpose(1, 2) if call.tokens_first else out).contiguous(), ticket

    def _switch(self, transformer: TransformerState, step: StepContext) -> None:
        """Ask which methods act in each layer at a step, and switch the processors by that; once for one step."""
        forward = self.forward
        if forward.step is None or replace(forward.step, batch=step.batch) != step:
            forward.acting = {layer: self.acting(step, layer.depth) for layer in transformer.layers}
            forward.switch()
        forward.stand(step)

    def _note_layout(self, transformer: TransformerState, branch: str, layout: TokenLayout, batch: int) -> None:
        """Let the methods see the shape of a forward if it is a new one; drop their state if the branch had another."""
        known = transformer.layouts.get(branch)
        if known == (layout, batch):
            return
        if known is not None:
            self.reset()
        transformer.layouts[branch] = layout, batch
        for handler in self.handlers:
            if note := handler.check_layout(layout):
                self.recorder.note(note)

    def _note_unseen(self, transformer: TransformerState, sizes: Grid, rows: int) -> None:
        """Let the methods see the layout of a forward that began without one, or whose beginning nobody saw."""
        if sizes == NO_GRID:
            raise ConfigError(
                f"{transformer.name} ({transformer.adapter.name}) reads its tokens' positions off tensor values, which "
                "can't be done in a transformer that is compiled whole; compile its blocks (compile_repeated_blocks), "
                "or detach"
            )
        forward = self.forward
        forward.lay(sizes)
        assert forward.layout is not None
        assert forward.step is not None
        branch, batch = forward.step.branch, forward.rows(rows)
        if transformer.adapter.variable_text_length:  # rows may be packed into one
            _, batch = transformer.layouts.get(branch, (None, batch))
        self._note_layout(transformer, branch, forward.layout, batch)
        forward.noted = sizes
        if forward.step.layout != forward.layout:
            forward.acting = {}
            forward.stand(replace(forward.step, layout=forward.layout))

    def _acting(self, layer: AttentionLayer, layout: TokenLayout | None) -> tuple[AttentionHandler, ...]:
        """Return the active methods of a layer, over a layout that may be a call's own; cached per forward."""
        forward = self.forward
        assert forward.step is not None
        if layout is not forward.layout:
            return self.acting(replace(forward.step, layout=layout), layer.depth)
        if layer not in forward.acting:
            forward.acting[layer] = self.acting(forward.step, layer.depth)
        return forward.acting[layer]

    def _context(
        self, layer: AttentionLayer, layout: TokenLayout | None, call: Call, differentiate: bool
    ) -> CallContext:
        """Make the context of a call, and count it."""
        forward, batch = self.forward, len(call.q)
        row = count = forward.calls[layer]
        forward.calls[layer] += 1
        # models that attend row by row make a call for each; of packed rows it is not known how many follow
        if forward.batch is not None or not layer.state.adapter.variable_text_length:
            row %= max(1, (forward.batch or batch) // batch)
        shared = None if forward.shards is None else forward.shards.share(layer.heads)
        here = {"layout": layout, "batch": batch, "layer": layer.index, "depth": layer.depth, "device": call.q.device}
        here |= {"row": row, "repeated": row != count, "differentiate": differentiate, "heads": shared}
        return CallContext(**{**forward.values, **here})

    def _attend(
        self, layer: AttentionLayer, call: Call, context: CallContext, handlers: tuple[AttentionHandler, ...]
    ) -> tuple[Tensor, AttentionPlan]:
        """Return the output of a call [B, H, S, D], and the plan that a backward follows."""
        calls, rows = layer.state.made, self.forward.rows
        followed = None if context.beside is None else calls.find(context, rows(context.batch), call.q.shape[1])
        facts, rests = followed, None
        if facts is None and call.mask is not None and stays_dense(handlers, call, context, self.recorder):
            facts = RunFacts(plan=AttentionPlan(), batch=context.batch, handlers=handlers)
            calls.note(context, rows(context.batch), facts)
            return run_dense(facts.plan, call, layer), facts.plan
        planning = time.perf_counter()
        if facts is None:
            planners = tuple(handler for handler in handlers if handler.phase is not Phase.GUIDANCE)
            if self._takes_turns:
                rests, context = turned(planners, context)
            facts = RunFacts(plan=self._plan(planners, call, context), batch=context.batch, handlers=planners)
        plan, additions = facts.plan, [handler for handler in handlers if handler not in facts.handlers]
        if additions:
            plan = self._plan(additions, call, context, facts)
        self.recorder.clock.lists += time.perf_counter() - planning
        return self._run(plan, call, context, layer, rests, facts, followed is not None)

    def _plan(
        self, handlers: Sequence[AttentionHandler], call: Call, context: CallContext, base: RunFacts | None = None
    ) -> AttentionPlan:
        """Let the methods plan a call, each after those before it; guidance adds to a ``base``."""
        plan = AttentionPlan() if base is None else base.plan
        whole = call if call.rows is None else call.for_planning()  # lists follow from all tokens, not from a share
        for index, handler in enumerate(handlers):
            # who selects by logits must see the keys as the kernel will
            seen = whole if plan.key_mean is None else whole.with_keys(plan.centred(call.k))
            try:
                plan = handler.plan(plan, seen, context)
            except ConfigError as error:
                before = (*(() if base is None else base.handlers), *handlers[:index])
                if not before:  # else the plan that it was given may be what it can't take
                    raise
                names = ", ".join(other.name for other in before)
                raise ConfigError(f"{handler.name} together with {names}: {error}") from None
        if base is not None:
            return plan
        asking = next((handler for handler in handlers if handler in self._precise), None) if self._precise else None
        if asking is not None:
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
        facts: RunFacts, beside: bool,
    ) -> tuple[Tensor, AttentionPlan]:  # fmt: skip
        """Launch a plan, then take the output steps; return the output, and the plan that a backward follows.

        ``facts`` is what the plan adds guidance to. A call ``beside`` another runs as that one did, by these facts, is
        corrected as that one was, and no method takes note of it.
        """
        if context.turn == "dense" and rests is not None and not rests.cached:
            plan = plan.whole()
        if beside and plan.only_values and plan.row_override is None:  # V is all that is left of it
            plan = replace(plan, tiles=None, token_order=None, selection=None)
        launched = call if plan.queries is None else replace(call, q=plan.queries)
        result, plan, launched, turn = self._launch(plan, launched, context, layer, rests, facts)
        steps = (*(correction.after for correction in facts.corrections), overridden, guided) if beside else self._steps
        for step in steps:
            result = step(plan, launched, context, result)
        if layer.state.made.wanted and not beside:
            facts = facts.ended(plan, result.exact, turn, result.corrections)
            layer.state.made.note(context, self.forward.rows(context.batch), facts)
        if self.observers:
            seen = PlannedCall(
                plan=plan, context=context, call=call, out=result.out, planned=result.planned, exact=result.exact
            )
            for observer in tuple(self.observers):
                observer(seen)
        # a backward must not choose among tiles again: it may choose others
        return result.out, plan if result.exact is None or not context.differentiate else plan.followed(result.exact)

    def _launch(
        self, plan: AttentionPlan, call: Call, context: CallContext, layer: AttentionLayer, rests: Rests | None,
        facts: RunFacts,
    ) -> tuple[KernelResult, AttentionPlan, Call, Turn | None]:  # fmt: skip
        """Run a plan by the least that it needs: fewer rows, the model's own attention, or our kernels.

        Returns:
            What came out, the plan that says what was computed, the call with its keys centred, the layer's turn.
        """
        recorder, turn = self.recorder, facts.turn
        if plan.reused is not None and call.rows is None:  # its parts are counted one by one
            return KernelResult(run_reusing(plan, call, context, layer, recorder, run_kernel)), plan, call, turn
        # the field before the property that begins with it: most plans mix no V, and each call asks
        if not plan.needs_kernel or (plan.only_values and plan.skips_logits):
            result = KernelResult(run_dense(plan, call, layer))
            recorder.planned_call(context, plan)
            return result, plan, call, turn
        call = call if plan.key_mean is None else call.with_keys(plan.centred(call.k))
        if call.rows is not None:
            result = KernelResult(run_own_rows(plan, call, layer, recorder, run_kernel))
        elif plan.tiles is not None and (turn is not None or (rests is not None and rests.cached)):
            launch = functools.partial(run_kernel, call=call, recorder=recorder, lse=True)
            result, plan, turn = run_turn(plan, call, context, rests, turn, launch)
        else:
            result = run_kernel(plan, call, recorder)
        recorder.planned_call(context, plan, result.exact)
        if self.observers and (self._corrects or facts.corrections):  # which may write to the output
            result = result._replace(planned=result.out.clone())
        return result, plan, call, turn


def run_kernel(plan: AttentionPlan, call: Call, recorder: Recorder, lse: bool = False) -> KernelResult:
    """Run a plan's kernel call, with its log-sum-exp if that is wanted; the keys are centred already."""
    tiles, arguments = plan.kernel_arguments(call)
    q, k, v = call.as_held(call.q, call.k, call.v)
    selects = plan.selection is not None
    output = block_sparse_attention_eager(q, k, v, tiles, **arguments, return_tiles=selects, return_lse=lse)
    recorder.ran_by(backend_of_last_call(), call.q, plan.precision)
    out, *extras = (output,) if isinstance(output, Tensor) else output
    sums = extras.pop(0) if lse else None
    exact = extras.pop(0) if selects else None
    out = out.transpose(1, 2) if call.tokens_first else out
    return KernelResult(out, exact, extras.pop(0) if extras else None, sums)


def overridden(plan: AttentionPlan, call: Call, context: CallContext, result: KernelResult) -> KernelResult:
    """Write the rows that a plan computes under a rule of their own into what the tiles gave them."""
    if plan.row_override is not None:
        override_rows(plan, call, *(x for x in (result.out, result.planned) if x is not None))
    return result


def guided(plan: AttentionPlan, call: Call, context: CallContext, result: KernelResult) -> KernelResult:
    """Guide rows of the batch away from others, where the plan asks for it."""
    if plan.guidance is None:
        return result
    planned = result.out if result.planned is None else result.planned
    return result._replace(out=plan.guidance.applied(result.out, call.rows), planned=planned)
