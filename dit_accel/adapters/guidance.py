"""How a family's pipelines guide: which prompt each forward holds, in which rows, and what can't be folded.

Every pipeline mixes its predictions by weights that sum to 1, cond + (s - 1) (cond - uncond), in whatever space. So
what is added to all of them alike is added to the result, whatever s is, at each step, with one expert or two: the
scale need not be known. What rescales by the conditional prediction is no such mix.
"""

import fnmatch
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError

RESCALING_OPTIONS = ("guidance_rescale", "_guidance_rescale", "_cfg_normalization")
"""Attributes of pipelines that, above 0, rescale the guided prediction by the conditional one."""

Prompt = Literal["cond", "uncond"]

Calls = Literal["alone", "in_turn", "together"]
"""How a pipeline calls its transformer in a step; each is a field of `Guidance` that names the pipeline classes."""

WEIGHING_GUIDERS = ("ClassifierFreeGuidance", "LTX2Guidance")
"""diffusers' guiders that, without a rescale, weigh the predictions of a step by weights that sum to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How the pipelines of a family guide.

    A pipeline that opens ``transformer.cache_context("cond")``, ``"uncond"`` or ``"cond_uncond"`` around its forwards
    says itself which prompt they hold. For one that opens none its class is named here, by its exact name, in one of
    the first three fields; a class that inherits ``__call__`` guides as the class it has it from. A pipeline with one
    of diffusers' guiders needs no entry: these take the conditional prediction first. What is named nowhere is refused
    for methods that must know the prompt.

    Attributes:
        alone: classes whose every forward holds the conditional prompt.
        in_turn: classes that run a forward with the conditional prompt in each step, then, while they guide, one with
            the negative prompt.
        together: classes whose forward holds both prompts while they guide, and the conditional one alone while they
            don't. Any further forward of a step is a perturbed prediction of the pipeline's own.
        converted: classes that change each prediction before their guider mixes them (its sign, to a clean sample, some
            of its tokens); what guidance adds is then added to each prediction, not to the guider's result.
        own: class name -> in words, why no method of guidance goes with it.
        first_rows: which rows come first where one forward holds both prompts.
        embedded: entry of the transformer's config that says that the scale of guidance is an input of the model, so
            that a forward in a loop written by hand, which opens no context, holds the conditional prompt.
        branch_of: component -> the prompt that it gets, where each has a transformer of its own.
        uncond_tokens: the unconditional forward holds ``all`` tokens of the conditional one, or the two have only the
            ``last`` in common.
        rows: input of the transformer -> where it holds a row for each of the batch: along an axis of the tensor (a
            list of tensors counts as an axis); ``each``, a list with an entry for each; None, nowhere. Of an input that
            is not named, tensors that are as long as the batch hold a row for each, also those in lists.
        rescales: pattern of pipeline classes -> in words, how these rescale the guided prediction by the conditional
            one, whatever their attributes say; the others do only where one of `RESCALING_OPTIONS` asks for it.
        rescaling_arguments: arguments of the pipelines' calls that ask for it as well, and that no attribute keeps.
        share_prefix: what a block takes besides its streams does not depend on earlier blocks, so that a second pass
            may begin at any block.

    Raises:
        ConfigError: for a value out of its choices, or a class that is named twice.
    """

    alone: tuple[str, ...] = ()
    in_turn: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    own: Mapping[str, str] = field(default_factory=dict)
    first_rows: Prompt = "uncond"
    embedded: str | None = None
    branch_of: Mapping[str, Prompt] = field(default_factory=dict)
    uncond_tokens: Literal["all", "last"] = "all"
    rows: Mapping[str, int | Literal["each"] | None] = field(default_factory=dict)
    rescales: Mapping[str, str] = field(default_factory=dict)
    rescaling_arguments: tuple[str, ...] = ()
    share_prefix: bool = True

    def __post_init__(self) -> None:
        named = [*self.alone, *self.in_turn, *self.together, *self.own]
        if twice := next((name for name in named if named.count(name) > 1), None):
            raise ConfigError(f"guidance names {twice} twice; leave it in the one field that is true of it")
        choices = [
            ("first_rows", self.first_rows, "uncond", "cond"),
            ("uncond_tokens", self.uncond_tokens, "all", "last"),
        ]
        choices += [(f"branch_of[{name!r}]", prompt, "cond", "uncond") for name, prompt in self.branch_of.items()]
        for option, value, first, second in choices:
            if value not in (first, second):
                raise ConfigError(f"{option} must be {first!r} or {second!r}, got {value!r}; use one of them")
        for name, axis in self.rows.items():
            if axis not in (None, "each") and not (isinstance(axis, int) and axis >= 0):
                raise ConfigError(
                    f"rows[{name!r}] must be an axis from 0, 'each' or None, got {axis!r}; use one of them"
                )

    def calls_of(self, call: "PipelineCall") -> Calls | None:
        """Find how a pipeline calls its transformer in a step; None: it is declared nowhere."""
        if getattr(call.pipe, "guider", None) is not None:
            return "in_turn"
        for name in call.classes:
            for calls in ("alone", "in_turn", "together"):
                if name in getattr(self, calls):
                    return calls
        return None

    def why_own(self, call: "PipelineCall") -> str | None:
        """Return why no method of guidance goes with a pipeline, or None."""
        return next((self.own[name] for name in call.classes if name in self.own), None)

    def why_not_folded(self, call: "PipelineCall") -> str | None:
        """Return how a pipeline rescales the guided prediction by the conditional one, or None."""
        guider = getattr(call.pipe, "guider", None)
        if guider is not None:
            return _why_guider(guider)
        for name, (pattern, why) in itertools.product(call.classes, self.rescales.items()):
            if fnmatch.fnmatch(name, pattern):
                return why
        for option in RESCALING_OPTIONS:
            value = getattr(call.pipe, option, None)
            if isinstance(value, (int, float)) and value > 0:
                return f"{option.lstrip('_')} = {value:g} scales the guided prediction by the conditional one"
        if argument := next((name for name in self.rescaling_arguments if call.variables.get(name)), None):
            return f"{argument} = {call.variables[argument]} scales the guided prediction by the conditional one"
        return None


def _why_guider(guider: Any) -> str | None:
    """Return how a guider rescales the guided prediction by the conditional one, or None."""
    if type(guider).__name__ not in WEIGHING_GUIDERS:
        return f"its guider {type(guider).__name__} does more with the conditional prediction than to weigh it"
    rescale = guider.guidance_rescale
    return f"the guider's guidance_rescale = {rescale:g} scales by the conditional one" if rescale else None


@dataclass(frozen=True, slots=True)
class PipelineCall:
    """A pipeline's call that is running."""

    pipe: Any = None  # the pipeline; None: a loop written by hand runs
    # names of its class and of those it inherits from, as far as the one whose ``__call__`` runs: another call would
    # guide in another way
    classes: tuple[str, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)  # what the call holds, such as the latents
