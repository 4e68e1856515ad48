"""Which prompt a forward holds, and in which rows: as its context, its transformer or its pipeline's class says."""

import sys
from collections.abc import Mapping
from typing import Any, Literal

from ..adapters.guidance import PipelineCall
from ..errors import ConfigError
from .site import ForwardContext, Site

Rows = tuple[slice, int] | None
"""Rows of a batch, and how many rows that has; None: all."""

Part = Literal["cond", "uncond", "both", "perturbed"]
"""What a forward holds; ``perturbed``: the conditional prompt, in a perturbed prediction of the pipeline's own."""

NAMES: Mapping[str, Part] = {
    "cond": "cond",
    "pred_cond": "cond",
    "uncond": "uncond",
    "pred_uncond": "uncond",
    "cond_uncond": "both",
    "uncond_stg": "perturbed",
    "uncond_modality": "perturbed",
    "pred_cond_skip": "perturbed",
    "pred_cond_seg": "perturbed",
    "pred_cond_stg": "perturbed",
    "pred_cond_modality": "perturbed",
}
"""Name of a ``cache_context``, as diffusers' pipelines and guiders give them -> what a forward in it holds."""

_OPEN = "open transformer.cache_context(name) with the name 'cond', 'uncond' or 'cond_uncond' around its forwards"


def part_of(method: str, site: Site, context: ForwardContext, latents: Any) -> Part:
    """Tell which prompt a forward holds, to a method that must know it; raise `ConfigError` if nothing says it."""
    guidance, pipe, call = site.adapter.guidance, site.running, running_call(site.running)
    if (why := guidance.why_own(call)) is not None:
        raise ConfigError(
            f"{method} does not go with {type(pipe).__name__}: {why}; detach it, or take another pipeline"
        )
    name = context.branch.rsplit("/", 1)[-1]
    if name in NAMES:
        return _in_one_forward(method, site, call, len(latents)) if NAMES[name] == "both" else NAMES[name]
    place, _, number = name.partition(" ")
    if place != "call" or not number.isdigit():
        raise _unknown(method, f"{site.name} runs in cache_context({name!r}), which does not tell")
    if guidance.branch_of:  # each prompt has a transformer of its own
        return guidance.branch_of.get(_component(site), "cond")
    if pipe is None:
        return _in_own_loop(method, site, int(number))
    calls = guidance.calls_of(call)
    if calls is None:
        or_name = f", or name the class in the guidance of the adapter {site.adapter.name!r}"
        raise _unknown(method, f"{type(pipe).__name__} does not tell", or_name)
    if calls == "together":  # both prompts in the first call; further ones are perturbations of the pipeline's
        return _in_one_forward(method, site, call, len(latents)) if number == "0" else "perturbed"
    return "cond" if calls == "alone" or number == "0" else "uncond"


def rows_of_prompt(site: Site, part: Part, batch: int, wanted: Literal["cond", "uncond"]) -> Rows:
    """Return the rows of one prompt in a forward; None: it holds no other."""
    if part != "both":
        return None
    half = batch // 2
    return (slice(0, half) if site.adapter.guidance.first_rows == wanted else slice(half, batch)), batch


def running_call(pipe: Any) -> PipelineCall:
    """Return a pipeline's running call, read off the call stack.

    So is known what a pipeline keeps nowhere else: how many rows it makes, and arguments that change how it mixes.
    """
    frame = None if pipe is None else sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",) and frame.f_locals.get("self") is pipe:
            defined_in = code.co_qualname.split(".")[-2]
            names = [cls.__name__ for cls in type(pipe).__mro__]
            last = names.index(defined_in) + 1 if defined_in in names else 1
            return PipelineCall(pipe, tuple(names[:last]), frame.f_locals)
        frame = frame.f_back
    return PipelineCall(pipe)


def _in_one_forward(method: str, site: Site, call: PipelineCall, rows: int) -> Part:
    """Tell whether a forward holds both prompts or, while a pipeline does not guide, the conditional one alone."""
    pipe, latents = call.pipe, call.variables.get("latents")
    if pipe is None:
        if rows % 2:
            raise ConfigError(
                f"{method} takes a forward in cache_context('cond_uncond') to hold as many rows of the one prompt as "
                f"of the other, and {site.name} got {rows} rows; give it both, or open cache_context('cond')"
            )
        return "both"
    if latents is None:
        guides = getattr(pipe, "do_classifier_free_guidance", None)
        if not isinstance(guides, bool):
            raise ConfigError(
                f"{method} must know whether a forward holds both prompts, and {type(pipe).__name__} keeps neither its "
                f"latents nor do_classifier_free_guidance; {_OPEN}"
            )
        return "both" if guides else "cond"
    if rows not in (len(latents), 2 * len(latents)):
        raise ConfigError(
            f"{method} takes a forward of {type(pipe).__name__} to hold one prompt or two for each of its "
            f"{len(latents)} latents, and {site.name} got {rows} rows; detach {method}"
        )
    return "cond" if rows == len(latents) else "both"


def _in_own_loop(method: str, site: Site, number: int) -> Part:
    """Tell which prompt a forward holds in a loop written by hand that opens no context."""
    embedded = site.adapter.guidance.embedded
    if embedded is not None and getattr(site.transformer.config, embedded, False) and number == 0:
        return "cond"
    raise _unknown(method, f"a loop written by hand around {site.name} does not tell")


def _unknown(method: str, problem: str, or_else: str = "") -> ConfigError:
    return ConfigError(f"{method} must know which prompt each forward holds, and {problem}; {_OPEN}{or_else}")


def _component(site: Site) -> str:
    """Return the name of a transformer in the pipeline that runs, else in the one that it was attached in."""
    parts = {} if site.running is None else vars(site.running)
    names = (name for name, part in parts.items() if getattr(part, "_orig_mod", part) is site.transformer)
    return next(names, site.name)
