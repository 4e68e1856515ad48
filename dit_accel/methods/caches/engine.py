"""The engine of all step caches: whose state a forward reads, whether it is computed or forecast, and the report.

A cache is a `StepCacheConfig` and a handler that says whether a step may be skipped. Everything else is here, once:
steps that are always computed, branches, transformers that take over, shapes that change, forecasts, the report.
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...errors import ConfigError
from ...report.sections import Section
from ..base import Handler, Model, Phase, Place
from ..gradients import is_recorded
from ..saving import Saving
from ..site import ForwardContext, Site, target_sample
from .cache_config import ExpertSteps, MeasuredCacheConfig, StepCacheConfig, is_unconditional
from .history import BranchOutput, History, given_beside, own_copies, tensor_shapes
from .log import CachedForward, section_of
from .ranks import agreed, process_groups


@dataclass(slots=True)
class StepDecision:
    """Whether a step is skipped, for all branches of a transformer together or for one by itself, and what it rests on.

    It lives from step to step; a new one begins where another branch or other latents are measured. What it keeps of
    the tensors that its handler was given is copied for it.

    Attributes:
        branch: the branch that is measured: the first one of a step.
        shapes: of what is measured.
        step: the last step that was decided.
        reuse: the step is skipped.
        reason: why.
        value: the indicator, where it was measured.
        in_a_row: steps skipped since the last computed one.
        kept: whatever the cache keeps from step to step; a subclass may have fields of its own beside it.
    """

    branch: str
    step: int = -1
    reuse: bool = False
    reason: str = ""
    value: float | None = None
    in_a_row: int = 0
    shapes: Any = None
    kept: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the indicator needs; one that two fields hold counts once."""
        leaves = tree_leaves(self._attributes())
        return sum({id(leaf): leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)}.values())

    def copy_shared(self, lent: Any) -> None:
        """Copy what it keeps of tensors that are somebody else's, who may write into them."""
        for name, value in own_copies(self._attributes(), lent).items():
            setattr(self, name, value)

    def _attributes(self) -> dict[str, Any]:
        """Return all attributes by name, also those of a subclass that declares none."""
        return {**getattr(self, "__dict__", {}), **{field.name: getattr(self, field.name) for field in fields(self)}}


class StepCacheHandler(Handler):
    """A step cache on one model: it skips forwards, and gives forecasts in their place.

    Who writes a cache says when: `indicator` measures how much a step changed; `seen` and `computed` keep on the
    decision what it is measured against. All else is here: branches, transformers that take over, shapes that change,
    training, steps that other methods need, copies of what the pipeline may overwrite, several devices, forecasts and
    the report.
    """

    phase = Phase.CACHES
    places = frozenset({Place.FORWARD})
    exclusive = frozenset({"cache"})
    decision_type: ClassVar[type[StepDecision]] = StepDecision
    settings: StepCacheConfig
    _reach: int | None = None  # in steps of this run

    def __init__(self, config: StepCacheConfig, model: Model) -> None:
        super().__init__(config, model)
        self._others: Sequence[Handler] = ()
        self._histories: dict[tuple[Any, ...], History] = {}  # by transformer, branch and, where it is one, part
        self._decisions: dict[tuple[str, str], StepDecision] = {}
        self._transformers: dict[str, Any] = {}
        self._transformer = ""
        self._since: dict[str, int] = {}  # transformer -> the first step that it made in this run
        self._start: int | None = None  # the first step that this run made
        self._log: list[CachedForward] = []

    # What a cache says.

    def indicator(self, context: ForwardContext, decision: StepDecision) -> float | None:
        """Return a measure of a step's change; the step is skipped while it is below the threshold.

        None: nothing is measured, and every step that may be skipped is.
        """
        return None

    def threshold(self) -> float | None:
        """Return the number that the indicator is compared with."""
        return self.settings.threshold if isinstance(self.settings, MeasuredCacheConfig) else None

    def seen(self, context: ForwardContext, decision: StepDecision) -> None:
        """Note the input of a step that was decided; tensors of it that the decision keeps are copied."""

    def arrived(self, context: ForwardContext, decision: StepDecision, history: History, output: Any) -> None:
        """Note the output of a computed step, which its branch's history could have forecast."""

    def computed(self, context: ForwardContext, decision: StepDecision, output: Any) -> None:
        """Note the output of a computed step; tensors of it that the decision keeps are copied."""

    # What all of them share.

    def transformer_of(self, context: ForwardContext) -> Any:
        """Return the transformer that a forward is of."""
        return self._transformers[context.transformer]

    def latents(self, context: ForwardContext) -> Tensor:
        """Return the latents of a forward, as one tensor."""
        return target_sample(context.inputs[self.model.adapter.latents])

    def stored(self, context: ForwardContext) -> Tensor:
        """Return the stored prediction of the branch's last computed forward."""
        return target_sample(self._histories[context.transformer, context.branch].last())

    def numbers(self, context: ForwardContext, *values: Tensor) -> list[float]:
        """Return scalars as numbers, summed over the ranks that must decide alike; waits for the device once."""
        return agreed(list(values), process_groups(self.transformer_of(context)))

    def install(self, site: Site) -> None:
        """Run around every forward of the transformer; raise `ConfigError` if another cache is active on it."""
        self.cover(site)

    def cover(self, site: Site) -> None:
        """Run around the forwards of a transformer; raise `ConfigError` if another cache is active on it."""
        require_no_cache(site.name, site.transformer, self.settings.requested_name)
        self._transformers[site.name] = site.transformer

        def around(context: ForwardContext, run: Callable[..., Any]) -> Any:
            output = self._around(context, run, site)
            self.note_held(sum(holder.nbytes for holder in (*self._histories.values(), *self._decisions.values())))
            return output

        site.around_forward(around)

    def check_with(self, others: Sequence[Handler]) -> None:
        self._others = tuple(others)

    def _around(self, context: ForwardContext, run: Callable[..., Any], site: Site) -> Any:
        latents, transformer = context.inputs[site.adapter.latents], site.name
        if self.is_trained(context, latents):
            return run()
        self._begin(context)
        key, shapes = (transformer, context.branch), self._shapes(context)
        # A branch beside another stores how far it lies from that one, so that both are forecast alike.
        beside = given_beside(self._histories, context, shapes, self._end(context))
        history = self._histories.get(key)
        if history is None or (history.shapes, history.beside) != (shapes, beside is not None):
            history = self._histories[key] = self._new_history(shapes, beside is not None)
        decision, leads, reuse = self._decide(context, bool(history.points) or beside is not None)
        if reuse:
            forecast = history.forecast(latents, context.step_index, self._end(context), beside)
            if history.correction is not None:
                history.correction.skipped(context)
            return forecast
        output = run()
        if is_recorded(output):
            self._histories.pop(key)
            return output
        if history.gives_other(output):  # such as a first one that holds text: what was measured says nothing of it
            history = self._histories[key] = self._new_history(shapes, beside is not None)
            if leads:
                decision = self._new_decision(context, decision)
                self._see(context, decision)
        corrected = self._corrected(context, history, output, latents, beside)
        if leads and history.points:  # before the output is stored, which a forecast would be made from
            self.arrived(context, decision, history, output)
        history.take(output, latents, context.step_index, beside)
        if leads:
            self.computed(context, decision, output)
            decision.copy_shared((context.inputs, output))
        return corrected

    def _corrected(
        self, context: ForwardContext, history: History, output: Any, latents: Any, beside: BranchOutput | None
    ) -> Any:
        """Return a computed output, corrected for the skipped steps before it, or as the branch beside it was."""
        if beside is not None:
            return beside.mended(output)
        if history.correction is None:
            return output
        missed = functools.partial(history.missed, output, latents, context.step_index, self._end(context))
        corrected = history.correction.computed(output, context, history.growth, missed)
        if corrected is not output:
            history.mend(output, corrected, context.step_index)
        return corrected

    def is_trained(self, context: ForwardContext, latents: Any) -> bool:
        """Tell whether a forward is recorded for gradients of its latents or of any weight."""
        if context.training or is_recorded(latents):
            return True
        weights = self.transformer_of(context).parameters()
        return torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)

    def _begin(self, context: ForwardContext) -> None:
        """Begin a forward, and forget the steps of another expert."""
        require_no_cache(context.transformer, self.transformer_of(context), self.settings.requested_name)
        if context.transformer != self._transformer:
            if not self._holds_a_prompt(context.transformer):
                self._forget()
            self._transformer = context.transformer
        self._since.setdefault(context.transformer, context.step_index)
        self._start = context.step_index if self._start is None else self._start
        self._reach = self.settings.reached(context.num_inference_steps)

    def _holds_a_prompt(self, transformer: str) -> bool:
        """Tell whether a transformer serves one prompt alone, in every step, beside another for the other prompt."""
        return transformer in self.model.adapter.guidance.branch_of

    def _expert_steps(self, context: ForwardContext) -> ExpertSteps:
        """Return which steps of this run a forward's transformer makes, as far as that is known."""
        name, count, share = context.transformer, context.num_inference_steps, self.first_expert()
        last = self._holds_a_prompt(name) or name == [*self._transformers][-1]
        until = None if last or share is None or count is None else round(share * count)
        return ExpertSteps(self._since[name], until, last)

    def first_expert(self) -> float | None:
        """Return the share of a run's steps that the first of two transformers makes, where that is known."""
        return self.model.family.first_expert if self.model.family else None

    def _shapes(self, context: ForwardContext) -> Any:
        """Return the shapes that must not change, or what was stored and measured is of no use."""
        return tensor_shapes(context.inputs[self.model.adapter.latents])

    def _new_history(self, shapes: Any, beside: bool) -> History:
        assert self._start is not None
        return History(self.settings, shapes, self._start, self._reach, beside)

    def _decide(self, context: ForwardContext, stored: bool) -> tuple[StepDecision, bool, bool]:
        """Decide whether to skip this forward, and log it; the first forward of a step is measured and decides for all.

        Returns:
            The decision, whether this forward was the first of its step, and whether it is skipped.
        """
        decision = self._decisions.get(self._key(context))
        leads = decision is None or decision.step != context.step_index
        if leads:
            decision = self._measure(context, decision)
        assert decision is not None
        reuse = decision.reuse and stored
        self._log.append(
            CachedForward(
                transformer=context.transformer, step_index=context.step_index, branch=context.branch, reused=reuse,
                reason=decision.reason if reuse or not decision.reuse else "nothing stored",
                value=decision.value if leads else None,
            )
        )  # fmt: skip
        return decision, leads, reuse

    def _measure(self, context: ForwardContext, decision: StepDecision | None) -> StepDecision:
        """Decide a step by its first forward."""
        if decision is None or (decision.branch, decision.shapes) != (context.branch, self._shapes(context)):
            decision = self._new_decision(context, decision)
        decision.value = None
        decision.reason = self._must_compute(context, decision) or ""
        decision.reuse = not decision.reason
        if decision.reuse:
            decision.reuse, decision.reason = self._measured(context, decision)
        decision.step = context.step_index
        decision.in_a_row = decision.in_a_row + 1 if decision.reuse else 0
        self._see(context, decision)
        return decision

    def _see(self, context: ForwardContext, decision: StepDecision) -> None:
        self.seen(context, decision)
        decision.copy_shared(context.inputs)

    def _key(self, context: ForwardContext) -> tuple[str, str]:
        """Return the transformer and, where branches decide apart, the branch that a decision is for."""
        return context.transformer, context.branch if self.settings.branches == "uncond" else ""

    def _new_decision(self, context: ForwardContext, before: StepDecision | None) -> StepDecision:
        """Return a decision that rests on nothing yet, for the step that another one decided or was to decide."""
        decision = self._decisions[self._key(context)] = self.decision_type(context.branch)
        decision.shapes = self._shapes(context)
        if before is not None:
            decision.step, decision.in_a_row = before.step, before.in_a_row
        return decision

    def _must_compute(self, context: ForwardContext, decision: StepDecision) -> str | None:
        """Return the reason why a step must be computed whatever is measured, or None if it may be skipped."""
        settings = self.settings
        if settings.branches == "uncond" and not is_unconditional(context.branch, settings.name):
            return "conditional"
        index, count, expert = context.step_index, context.num_inference_steps, self._expert_steps(context)
        if (why := settings.always_computed(index, count, expert)) is not None:
            return why
        if not self._stored(context):
            return "nothing stored"
        if (why := settings.most_skipped(decision.in_a_row, index, count, expert)) is not None:
            return why
        needing = self._needing(context)
        return needing and f"{needing} needs it"

    def _needing(self, context: ForwardContext) -> str | None:
        """Return the name of a method that needs the step; called before any of it runs."""
        if context.beside is not None:
            return None  # methods learn nothing there
        return next((other.name for other in self._others if other.needs_step(context)), None)

    def _stored(self, context: ForwardContext) -> bool:
        return bool(self._histories[context.transformer, context.branch].points)

    def _measured(self, context: ForwardContext, decision: StepDecision) -> tuple[bool, str]:
        """Compare the indicator with the threshold; return whether the step is skipped, and the reason."""
        threshold = self.threshold()
        if threshold is not None and not threshold > 0:
            return False, "threshold 0"
        value = decision.value = self.indicator(context, decision)
        if threshold is None:
            return True, "listed"
        if value is None:
            return False, "nothing measured yet"
        return value < threshold, "not a number" if math.isnan(value) else "measured"

    @staticmethod
    def _end(context: ForwardContext) -> int:
        return (context.num_inference_steps or context.step_index + 1) - 1

    def _forget(self) -> None:
        self._histories.clear()
        self._decisions.clear()

    def reset(self) -> None:
        self._forget()
        self._transformer, self._start = "", None

    def begin_run(self) -> None:
        self._log.clear()
        self._since.clear()

    def report(self) -> Section | None:
        return section_of(self.name, self._log, self.threshold())

    def counted(self, skipped: Collection[int], notes: tuple[str, ...] = ()) -> Saving:
        """Return the saving of the steps that are skipped."""
        whole = frozenset(skipped if self.settings.branches == "all" else ())
        return Saving(forwards=self.forwards_cached() * len(skipped), skipped=whole, notes=notes)

    def forwards_cached(self) -> int:
        """Count the forwards of a step in which the cache acts."""
        family = self.model.family
        return family.forwards_per_step - (self.settings.branches == "uncond") if family else 1


def require_no_cache(name: str, transformer: Any, requested: str) -> None:
    """Raise `ConfigError` if one of diffusers' caches, or cache-dit's, is active where another is or is to be."""
    active = None
    if getattr(transformer, "is_cache_enabled", None):
        enabled = type(transformer._cache_config).__name__
        active = f"diffusers' {enabled} is enabled on it already; call pipe.{name}.disable_cache() first"
    elif getattr(transformer, "_is_cached", None) and hasattr(transformer, "_context_manager"):  # cache-dit's marks
        active = "cache-dit is active on it already; call cache_dit.disable_cache(pipe) first"
    if active:
        raise ConfigError(f"{requested} can't act on {name}, which takes one cache: {active}")
