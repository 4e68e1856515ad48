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
from ..saving import Saving
from ..site import ForwardContext, Site, target_sample
from .cache_config import MeasuredCacheConfig, StepCacheConfig, Turn, is_unconditional
from .history import History, given_beside, own_copies, shapes_of
from .log import CachedForward, section_of
from .ranks import agreed, groups_of


@dataclass(slots=True)
class Decider:
    """Who decides for a step: all branches of a transformer together, or one branch by itself.

    A new one begins where another branch or other latents are measured. What it keeps of the tensors that its handler
    was given is copied for it.

    Attributes:
        branch: the branch that is measured: the first one of a step.
        shapes: of what is measured.
        step: the last step that was decided.
        reuse: the step is skipped.
        reason: why.
        value: the indicator, where it was requested.
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
        values = tree_leaves(self._kept())
        return sum({id(one): one.nbytes for one in values if isinstance(one, Tensor)}.values())

    def own(self, given: Any) -> None:
        """Copy what it keeps of tensors that are somebody else's, who may write into them."""
        for name, value in own_copies(self._kept(), given).items():
            setattr(self, name, value)

    def _kept(self) -> dict[str, Any]:
        """Return all attributes: those of a subclass that declares none of its own too."""
        return {**getattr(self, "__dict__", {}), **{field.name: getattr(self, field.name) for field in fields(self)}}


class StepCacheHandler(Handler):
    """A step cache on one model: it skips forwards, and gives forecasts in their place.

    Who writes a cache says when: `indicator` measures how much a step changed; `seen` and `computed` keep on the
    decider what it is measured against. All else is here: branches, transformers that take over, shapes that change,
    training, steps that other methods need, copies of what the pipeline may overwrite, several devices, forecasts and
    the report.
    """

    phase = Phase.CACHES
    places = frozenset({Place.FORWARD})
    exclusive = frozenset({"cache"})
    decider_type: ClassVar[type[Decider]] = Decider
    settings: StepCacheConfig
    _reach: int | None = None  # in steps of this run

    def __init__(self, config: StepCacheConfig, model: Model) -> None:
        super().__init__(config, model)
        self._others: Sequence[Handler] = ()
        self._histories: dict[tuple[Any, ...], History] = {}  # by transformer, branch and, where it is one, part
        self._deciders: dict[tuple[str, str], Decider] = {}
        self._transformers: dict[str, Any] = {}
        self._transformer = ""
        self._since: dict[str, int] = {}  # transformer -> the first step that it made in this run
        self._steps_skipped: set[int] = set()
        self._start: float | None = None
        self._log: list[CachedForward] = []

    # What a cache says.

    def indicator(self, context: ForwardContext, decider: Decider) -> float | None:
        """Return how much a step that may be skipped changed; it is skipped below the threshold.

        None: nothing is measured, and every step that may be skipped is.
        """
        return None

    def threshold(self) -> float | None:
        """Return what the indicator is compared with."""
        return self.settings.threshold if isinstance(self.settings, MeasuredCacheConfig) else None

    def seen(self, context: ForwardContext, decider: Decider) -> None:
        """Note the input of a step, computed or not, after it was decided; what the decider keeps of it is copied."""

    def arrived(self, context: ForwardContext, decider: Decider, history: History, output: Any, time: float) -> None:
        """Note what a step that was computed gave, beside what its branch's history would have forecast for it."""

    def computed(self, context: ForwardContext, decider: Decider, output: Any) -> None:
        """Note what a step that was computed gave; what the decider keeps of it is copied."""

    # What all of them share.

    def transformer_of(self, context: ForwardContext) -> Any:
        """Return the transformer that a forward is of."""
        return self._transformers[context.transformer]

    def latents(self, context: ForwardContext) -> Tensor:
        """Return the latents of a forward, as one tensor."""
        return target_sample(context.inputs[self.model.adapter.latents])

    def stored(self, context: ForwardContext) -> Tensor:
        """Return what was stored of the sample that the branch's last computed forward gave."""
        return target_sample(self._histories[context.transformer, context.branch].last())

    def numbers(self, context: ForwardContext, *values: Tensor) -> list[float]:
        """Return scalars as numbers, summed over the ranks that must decide alike; waits for the device once."""
        return agreed(list(values), groups_of(self.transformer_of(context)))

    def install(self, site: Site) -> None:
        """Run around every forward of the transformer; raise `ConfigError` if another cache is active on it."""
        self.require_free(site)
        self.cover(site)

    def require_free(self, site: Site) -> None:
        """Raise `ConfigError` if another cache is active on a transformer."""
        require_no_cache(site.name, site.transformer, self.settings.requested_name)

    def cover(self, site: Site) -> None:
        """Run around the forwards of a transformer."""
        self._transformers[site.name] = site.transformer
        site.around_forward(lambda context, run: self._around(context, run, site.adapter.latents, site.name))

    def check_with(self, others: Sequence[Handler]) -> None:
        """Note the other methods, which say what steps they need."""
        self._others = tuple(others)

    def _around(self, context: ForwardContext, run: Callable[..., Any], name: str, transformer: str) -> Any:
        latents = context.inputs[name]
        if self.is_trained(context, latents):
            return run()
        time = self._begin(context)
        key, shapes = (transformer, context.branch), self._shapes(context)
        near = given_beside(self._histories, context, shapes, time, self._end(context))
        history = self._histories.get(key)
        if history is None or (history.shapes, history.beside) != (shapes, near is not None):
            history = self._histories[key] = self._new_history(shapes, near is not None)
        decider, leads, reuse = self._settle(context, bool(history.points) or near is not None)
        if reuse:
            given = history.forecast(latents, context.step_index, time, self._end(context), near)
            if history.correction is not None:
                history.correction.skipped(context, time)
            self.note_held(self._held())
            return given
        output = run()
        if any(requires_grad(leaf) for leaf in tree_leaves(output)):
            self._histories.pop(key)
            return output
        if history.gives_other(output):
            history = self._histories[key] = self._new_history(shapes, near is not None)
            if leads:
                decider = self._new_decider(context, decider)
                self._see(context, decider)
        given = output if near is None else near.mended(output)
        if history.correction is not None:
            missed = functools.partial(history.missed, output, latents, time, self._end(context))
            given = history.correction.computed(output, context, time, history.growth, missed)
            if given is not output:
                history.mend(output, given, context.step_index)
        if leads and history.points:
            self.arrived(context, decider, history, output, time)
        history.take(output, latents, context.step_index, time, near)
        if leads:
            self.computed(context, decider, output)
            decider.own((context.inputs, output))
        self.note_held(self._held())
        return given

    def is_trained(self, context: ForwardContext, latents: Any) -> bool:
        """Tell whether gradients are taken through a forward, to its latents or to any of the weights."""
        if context.training or is_recorded(latents):
            return True
        return torch.is_grad_enabled() and any(map(requires_grad, self.transformer_of(context).parameters()))

    def _begin(self, context: ForwardContext) -> float:
        """Drop what another expert left, of which what it gave says nothing, and return the time of the step.

        Raises:
            ConfigError: if another cache was switched on after this one was attached.
        """
        require_no_cache(context.transformer, self.transformer_of(context), self.settings.requested_name)
        if context.transformer != self._transformer:
            if not self._holds_a_prompt(context.transformer):
                self._histories.clear()
                self._deciders.clear()
            self._transformer = context.transformer
        self._since.setdefault(context.transformer, context.step_index)
        time = self._time(context)
        self._start = time if self._start is None else self._start
        self._reach = self.settings.reached(context.num_inference_steps)
        return time

    def _holds_a_prompt(self, transformer: str) -> bool:
        """Tell whether a transformer makes one prompt's forward of every step, beside another that makes the rest."""
        return transformer in self.model.adapter.guidance.branch_of

    def _turn(self, transformer: str) -> Turn:
        """Return which steps of this run a transformer makes, as far as that is known."""
        last = self._holds_a_prompt(transformer) or transformer == [*self._transformers][-1]
        return Turn(self._since[transformer], last)

    def _shapes(self, context: ForwardContext) -> Any:
        """Return what must stay the same for what was stored and measured to be of use."""
        return shapes_of(context.inputs[self.model.adapter.latents])

    def _new_history(self, shapes: Any, beside: bool = False) -> History:
        assert self._start is not None
        return History(self.settings, shapes, self._start, reach=self._reach, beside=beside)

    def _settle(self, context: ForwardContext, stored: bool) -> tuple[Decider, bool, bool]:
        """Return who decides, whether this forward is the one that is measured, and whether it is skipped; log that.

        ``stored``: there is something to forecast it from.
        """
        decider, leads = self._decide(context)
        reuse, reason = decider.reuse, decider.reason
        if reuse and not stored:
            reuse, reason = False, "nothing stored"
        self._log.append(
            CachedForward(
                transformer=context.transformer, step_index=context.step_index, branch=context.branch, reused=reuse,
                reason=reason, value=decider.value if leads else None,
            )
        )  # fmt: skip
        return decider, leads, reuse

    def _held(self) -> int:
        """Return how many bytes are held from step to step now."""
        return sum(one.nbytes for one in (*self._histories.values(), *self._deciders.values()))

    def _decide(self, context: ForwardContext) -> tuple[Decider, bool]:
        """Return who decides for a forward, and whether this one is the first of its step, which is measured."""
        decider = self._deciders.get(self._whose(context))
        if decider is not None and decider.step == context.step_index:
            return decider, False
        if decider is None or (decider.branch, decider.shapes) != (context.branch, self._shapes(context)):
            decider = self._new_decider(context, decider)
        decider.value = None
        decider.reason = self._must_compute(context, decider) or ""
        decider.reuse = not decider.reason
        if decider.reuse:
            decider.reuse, decider.reason = self._measured(context, decider)
        decider.step = context.step_index
        decider.in_a_row = decider.in_a_row + 1 if decider.reuse else 0
        if decider.reuse:
            self._steps_skipped.add(context.step_index)
        self._see(context, decider)
        return decider, True

    def _see(self, context: ForwardContext, decider: Decider) -> None:
        self.seen(context, decider)
        decider.own(context.inputs)

    def _whose(self, context: ForwardContext) -> tuple[str, str]:
        """Return whose forwards are decided together."""
        return context.transformer, context.branch if self.settings.branches == "uncond" else ""

    def _new_decider(self, context: ForwardContext, before: Decider | None) -> Decider:
        """Return a decider that has measured nothing yet, for the step that another one decided or was to decide."""
        decider = self._deciders[self._whose(context)] = self.decider_type(context.branch)
        decider.shapes = self._shapes(context)
        if before is not None:
            decider.step, decider.in_a_row = before.step, before.in_a_row
        return decider

    def _must_compute(self, context: ForwardContext, decider: Decider) -> str | None:
        """Return why a step is computed whatever is measured, or None."""
        settings = self.settings
        if settings.branches == "uncond" and not is_unconditional(context.branch, settings.name):
            return "conditional"
        turn = self._turn(context.transformer)
        if (why := settings.always_computed(context.step_index, context.num_inference_steps, turn)) is not None:
            return why
        if not self._stored(context):
            return "nothing stored"
        index, count = context.step_index, context.num_inference_steps
        skips = len(self._steps_skipped - {index})
        if (why := settings.most_skipped(decider.in_a_row, skips, index, count, turn)) is not None:
            return why
        needing = self._needing(context)
        return needing and f"{needing} needs it"

    def _needing(self, context: ForwardContext) -> str | None:
        """Return the name of a method that needs the step; called before any of it runs."""
        if context.beside is not None:
            return None  # methods learn nothing there
        return next((other.name for other in self._others if other.needs_step(context)), None)

    def _stored(self, context: ForwardContext) -> bool:
        history = self._histories.get((context.transformer, context.branch))
        return history is not None and bool(history.points)

    def _measured(self, context: ForwardContext, decider: Decider) -> tuple[bool, str]:
        """Return whether a step is skipped, and why, by what is measured; anything but a number below computes it."""
        threshold = self.threshold()
        if threshold is not None and not threshold > 0:
            return False, "threshold 0"
        value = decider.value = self.indicator(context, decider)
        if threshold is None:
            return True, "listed"
        if value is None:
            return False, "nothing measured yet"
        return value < threshold, "not a number" if math.isnan(value) else "measured"

    def _time(self, context: ForwardContext) -> float:
        if self.settings.variable == "step":
            return float(context.step_index)
        if context.sigma is None and (needs := self.settings.noise_needed()) is not None:
            raise needs.untold()
        return context.sigma or 0.0

    def _end(self, context: ForwardContext) -> float:
        if self.settings.variable == "sigma":
            return 0.0
        return float((context.num_inference_steps or context.step_index + 1) - 1)

    def reset(self) -> None:
        """Free what is stored."""
        self._histories.clear()
        self._deciders.clear()
        self._transformer, self._start = "", None

    def begin_run(self) -> None:
        """Forget what was done."""
        self._log.clear()
        self._since.clear()
        self._steps_skipped.clear()

    def report(self) -> Section | None:
        """Return what was computed and reused in the last generation, by step and branch."""
        return section_of(self.name, self._log, self.threshold())

    def counted(self, skipped: Collection[int], notes: tuple[str, ...] = ()) -> Saving:
        """Return the saving of the steps that are skipped."""
        every = self.settings.branches == "all"
        rows = self.model.family.forwards_per_step if self.model.family and every else 1
        return Saving(forwards=rows * len(skipped), skipped=frozenset(skipped if every else ()), notes=notes)


def is_recorded(value: Any) -> bool:
    """Tell whether something lies in a graph of gradients, whose forward can't be skipped."""
    return torch.is_grad_enabled() and any(requires_grad(leaf) for leaf in tree_leaves(value))


def requires_grad(value: Any) -> bool:
    """Tell whether something is a tensor that asks for gradients."""
    return isinstance(value, Tensor) and value.requires_grad


def require_no_cache(name: str, transformer: Any, requested: str) -> None:
    """Raise `ConfigError` if one of diffusers' caches, or cache-dit's, is active where another is or is to be."""
    found = None
    if getattr(transformer, "is_cache_enabled", False):
        enabled = type(transformer._cache_config).__name__
        found = f"diffusers' {enabled} is enabled on it already; call pipe.{name}.disable_cache() first"
    elif getattr(transformer, "_is_cached", False) and hasattr(transformer, "_context_manager"):  # cache-dit's marks
        found = "cache-dit is active on it already; call cache_dit.disable_cache(pipe) first"
    if found:
        raise ConfigError(f"{requested} can't act on {name}, which takes one cache: {found}")
