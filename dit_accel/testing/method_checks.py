"""Checks of what all methods with a case do on a model: alone, in batches, in pairs, and under padding."""

import itertools

import torch

from ..attachment.attachment import attach
from . import promises
from .method_cases import apart, cases_for, configs_of, warm_of
from .promises import require_neutral, require_rows_alone, require_together
from .recording import require
from .tiny_models import Case, wide_inputs


def check_neutral(case: Case) -> None:
    """Attached and dense is the untouched model, bit for bit, and detaching leaves no trace."""
    for settings in ((), *(tried.neutral for tried in cases_for(case).values())):
        require_neutral(case, settings)


def check_active(case: Case) -> str | None:
    """An active method changes the output; one on attention plans every layer's call once a forward, text exact."""
    cases = cases_for(case).values()
    for tried in cases:
        promises.check_active(case, tried)
        promises.check_planned(case, tried)
    return None if cases else "every method with a case is refused"


def check_batch(case: Case) -> str | None:
    """Guidance in one batched call gives what two calls give, dense or not."""
    if case.model.max_batch < 2:
        return "a forward takes one row"
    wide = case.wide()
    for cases in ((), *((tried,) for tried in cases_for(case).values())):
        methods = configs_of(*(tried.active for tried in cases))
        require_rows_alone(case, methods, warm_of(*cases), "reference", wide)
    return None


def check_pairs(case: Case) -> str | None:
    """Any two methods attached together: neutral, nothing changes; active, either order gives what the plan says."""
    alone = [tried for tried in cases_for(case).values() if len(configs_of(tried.active)) == 1]
    pairs = [pair for pair in itertools.combinations(alone, 2) if not apart(*pair)]
    if not pairs:
        return "fewer than two methods with a case apply"
    wide = case.wide()
    for pair in pairs:
        first, second = pair
        require_neutral(case, configs_of(first.neutral, second.neutral))
        methods, warm = configs_of(first.active, second.active), warm_of(*pair)
        require_together(case, methods, warm)
        require_rows_alone(case, methods, warm, "torch", wide)  # far faster than the specification
    return None


def check_padding(case: Case) -> str | None:
    """What a mask hides has no influence on the video."""
    inputs = wide_inputs(case.inputs(2))
    other = case.with_other_padding(inputs)
    if other is None:
        return "no text is masked"
    wide = case.wide()
    if not torch.equal(case.run(inputs, transformer=wide), case.run(other, transformer=wide)):
        return "the untouched model lets padded text through"
    for cases in ((), *((tried,) for tried in cases_for(case).values())):
        methods, warm = configs_of(*(tried.active for tried in cases)), warm_of(*cases)
        with attach(wide, *methods, preset="none", backend="reference"):
            outputs = [case.run_after(warm, x, transformer=wide) for x in (inputs, other)]
        require(torch.equal(*outputs), f"{methods}: padded text changes the output")
    return None
