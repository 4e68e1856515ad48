"""Checks of what methods do on a model: that they change it, alone, in batches, in pairs, and under padding."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from ..attachment.attachment import Attachment, attach
from ..attachment.backends import Backend
from ..methods.base import Place
from .method_cases import MethodCase, apart, cases_for, configs_of, warm_of
from .recording import recorded, require, require_as_planned, require_same, require_text_exact
from .tiny_models import Case, wide_inputs


def check_active(case: Case, cases: Mapping[str, MethodCase] | None = None) -> str | None:
    """An active method changes the output; one on attention plans every layer's call once a forward, text exact."""
    cases = cases_for(case) if cases is None else cases
    if not cases:
        return "every method with a case is refused"
    inputs = case.inputs(2)
    for tried in cases.values():
        warm, plain = tried.warm, case.run(inputs, tried.warm)
        with (
            attach(case.transformer, *configs_of(tried.active), preset="none") as attachment,
            recorded(attachment) as calls,
        ):
            changed = case.run_after(warm, inputs)
            require(not torch.equal(changed, plain), f"{tried.active} changes nothing")
            require(bool(changed.isfinite().all()), f"{tried.active} makes values that are not finite")
            if Place.ATTENTION in tried.places:
                _require_planned_once(tried, attachment)
            case.run(inputs, step=warm + 1)
            case.run(case.inputs(1), step=warm + 2)
            again = case.run_after(warm, inputs)
            require(torch.equal(again, changed), "a run differs from the first after another batch")
        for call in calls:
            require(call.q.shape[2] == call.k.shape[2], "a call is not self-attention")
            require_text_exact(call)
        if Place.ATTENTION in tried.places:
            require_as_planned(calls)
    return None


def _require_planned_once(tried: MethodCase, attachment: Attachment) -> None:
    report, layers = attachment.report(), attachment.engine.layers
    reached = [step.sparse_layers for step in report.steps]
    require(reached == [len(layers)] * (tried.warm + 1), "not every layer was reached once")
    description = (
        "keeps every tile; give the tiny model more tokens" if tried.thins else "leaves tiles out; its case says no"
    )
    kept = report.sparse_density
    require(kept is not None and (kept < 1) == tried.thins, f"{tried.active} {description}")


def check_batch(case: Case, cases: Mapping[str, MethodCase] | None = None) -> str | None:
    """Guidance in one batched call gives what two calls give, dense or not."""
    if case.model.max_batch < 2:
        return "a forward takes one row"
    wide, both = case.wide(), wide_inputs(case.inputs(2))
    for tried in ((), *((tried,) for tried in (cases_for(case) if cases is None else cases).values())):
        _require_rows_alone(case, wide, both, *tried)
    return None


def _require_rows_alone(
    case: Case, wide: Any, both: Mapping[str, Any], *cases: MethodCase, backend: Backend = "reference"
) -> None:
    methods, warm = configs_of(*(tried.active for tried in cases)), warm_of(*cases)
    with attach(wide, *methods, preset="none", backend=backend):
        batched = case.run_after(warm, both, branch="cond_uncond", transformer=wide)
        for row, branch in enumerate(("uncond", "cond")):
            alone = case.run_after(warm, case.row(both, row), branch=branch, transformer=wide)
            require_same(batched[row : row + 1], alone, f"{methods} row {row} of a batch differs from itself alone")


def check_pairs(case: Case) -> str | None:
    """Any two methods attached together: neutral, nothing changes; active, either order gives what the plan says."""
    alone = [tried for tried in cases_for(case).values() if len(configs_of(tried.active)) == 1]
    pairs = [pair for pair in itertools.combinations(alone, 2) if not apart(*pair)]
    if not pairs:
        return "fewer than two methods with a case apply"
    inputs = case.inputs(2)
    wide, both = case.wide(), wide_inputs(inputs)
    untouched = [case.run(inputs, step) for step in range(1 + max(warm_of(*pair) for pair in pairs))]
    for one, other in pairs:
        methods, warm = configs_of(one.active, other.active), warm_of(one, other)
        plain = untouched[warm]
        with attach(case.transformer, *configs_of(one.neutral, other.neutral), preset="none"):
            require(torch.equal(case.run(inputs, warm), plain), f"{one.neutral} and {other.neutral} changed the output")
        with attach(case.transformer, *methods, preset="none") as attachment, recorded(attachment) as calls:
            changed = case.run_after(warm, inputs)
        require(not torch.equal(changed, plain), f"{methods} change nothing")
        require(bool(changed.isfinite().all()), f"{methods} make values that are not finite")
        for call in calls:
            require_text_exact(call)
        require_as_planned(calls)
        with attach(case.transformer, *reversed(methods), preset="none"):
            again = case.run_after(warm, inputs)
            require(torch.equal(again, changed), f"{methods} attached in the other order give another output")
        if case.model.max_batch > 1:
            _require_rows_alone(case, wide, both, one, other, backend="torch")  # far faster than the specification
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
