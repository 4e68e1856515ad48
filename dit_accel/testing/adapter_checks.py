"""Check an adapter: tiny random transformers of its classes run every identity and invariant that applies, on a CPU.

What is checked is the meeting of model and core: which modules are touched, where the tokens lie, that nothing changes
where nothing should, and that a planned call computes what its plan says. What a method is worth is not checked.
"""

import contextlib
import copy
import fnmatch
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.registry import adapters
from ..attachment.attachment import Attachment, attach, attachment_of
from ..attachment.find import attention_modules
from ..errors import ConfigError
from ..methods import registry
from ..methods.base import AttentionHandler, Handler, Model, Phase
from ..methods.config import MethodConfig
from ..plan.call import Call
from ..plan.context import CallContext, StepContext
from ..plan.plan import AttentionPlan
from ..plan.tiling import Tiling
from .method_cases import METHOD_CASES, MethodCase, configs_of
from .recording import recorded, require, require_as_planned, require_same, require_text_exact, silenced, stopped_at
from .tiny_models import Case, TinyModel, require_patterns_match, rows_of, wide_inputs


def check_adapter(
    adapter: Adapter, *models: TinyModel, only: Collection[str] | None = None
) -> dict[str, dict[str, str]]:
    """Run every identity and invariant that applies to an adapter.

    Args:
        adapter: the adapter, registered by its entry point.
        models: one tiny model or more of each transformer class that the adapter covers.
        only: names of `CHECKS`; None: all of them, and every class must have a model.

    Returns:
        Model -> check -> "passed", or why it does not apply.

    Raises:
        AssertionError: for the first check that fails; it names the transformer class and the check.
    """
    named, given = set(adapter.transformers), {model.transformer.__name__ for model in models}
    require(
        given <= named if only is not None else given == named,
        f"adapter {adapter.name!r} names {', '.join(sorted(named))}, tiny models were given of "
        f"{', '.join(sorted(given))}; give one or more of each class that it names, and of no other",
    )
    checks = {name: CHECKS[name] for name in (CHECKS if only is None else only)}
    found: dict[str, dict[str, str]] = {}
    cases = [Case(adapter, model) for model in models]
    if "places" in checks and given == named:
        require_patterns_match(adapter, cases)
    for number, (model, case) in enumerate(zip(models, cases, strict=True)):
        case.require_own_forward(f"{model.transformer.__name__} {number}")
        results = found[f"{model.transformer.__name__} {number}"] = {}
        for name, check in checks.items():
            try:
                results[name] = check(case) or "passed"
            except Exception as error:
                raise AssertionError(
                    f"{model.transformer.__name__} {number}: check {name!r} failed: {error}"
                ) from error
    return found


def _cases_for(case: Case) -> dict[str, MethodCase]:
    refused = case.adapter.refused
    return {n: t for n, t in METHOD_CASES.items() if not any(config.name in refused for config in configs_of(t.active))}


def _warm(*cases: MethodCase) -> int:
    return max((tried.warm for tried in cases), default=0)


class _EverythingConfig(MethodConfig):
    """Asks for `_Everything`."""

    name = "everything"


class _Everything(AttentionHandler):
    """Sends every attention call to the kernels from ``first_step`` on, with every tile exact."""

    config_type = _EverythingConfig
    phase = Phase.LISTS
    first_step: ClassVar[int] = 0

    def is_active(self, step: StepContext, depth: int) -> bool:
        return step.step_index >= self.first_step

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        return plan.with_tiles(*Tiling().full(context.layout, context.device))


class _FromStepOne(_Everything):
    first_step = 1


@contextlib.contextmanager
def planned(transformer: Any, adapter: Adapter, handler: type[Handler] = _Everything) -> Iterator[Attachment]:
    """Attach so that every call goes to the kernels with every tile exact: dense, and computed by us."""
    with attach(transformer) as attachment:
        model = Model(adapter=adapter, family=None, heads=0, layers=0)
        attachment._execution.use((handler(_EverythingConfig(), model),))
        yield attachment


def _check_places(case: Case) -> None:
    """The adapter names self-attention modules and all of them; every other attention module is left alone."""
    name = type(case.transformer).__name__
    known = {name: adapter for adapter in adapters().values() for name in adapter.transformers}
    found = f"{name} is registered for another adapter object" if name in known else f"no adapter covers {name}"
    install = "install the package whose entry point gives this adapter"
    require(known.get(name) is case.adapter, f"{found}; {install}, and import the adapter from there")
    forward = list(inspect.signature(type(case.transformer).forward).parameters)[1:]
    for asked in (case.adapter.latents, case.adapter.timestep):
        require(asked in forward, f"forward has no input {asked!r}; it has {', '.join(forward)}")
    attended = {n: m.processor for n, m in case.transformer.named_modules() if hasattr(m, "processor")}
    places = [n for n, _, _ in attention_modules(case.transformer, case.adapter)]
    require(len(set(places)) == len(places), f"patterns overlap: {places}")
    alone = {n for n in attended if any(fnmatch.fnmatch(n, pattern) for pattern in case.model.left_alone)}
    require(not alone & set(places), f"left_alone names modules of the adapter: {sorted(alone & set(places))}")
    unknown = set(attended) - alone - set(places)
    require(not unknown, f"neither the adapter nor left_alone names {sorted(unknown)}")
    with attach(case.transformer):
        touched = {
            n for n, processor in attended.items() if case.transformer.get_submodule(n).processor is not processor
        }
        require(touched == set(places), f"attach touched {sorted(touched ^ set(places))} besides or not")


def _check_neutral(case: Case) -> None:
    """Attached and dense is the untouched model, bit for bit, and detach leaves no trace."""
    calls = [(case.inputs(1), "cond"), (case.inputs(1), "uncond"), (case.inputs(2), "cond_uncond")]
    plain = [case.run(inputs, branch=branch) for inputs, branch in calls]
    keys = {name: set(module.__dict__) for name, module in case.transformer.named_modules()}
    processors = {n: m.processor for n, m in case.transformer.named_modules() if hasattr(m, "processor")}
    for methods in ((), *(configs_of(tried.neutral) for tried in _cases_for(case).values())):
        with attach(case.transformer, *methods) as attachment:
            for (inputs, branch), expected in zip(calls, plain, strict=True):
                require(torch.equal(case.run(inputs, branch=branch), expected), f"{methods} changed the output")
            require(attachment.report().density == 1.0, f"{methods} did not stay dense")
        require(torch.equal(case.run(calls[0][0]), plain[0]), f"{methods} left the output changed")
        now = {name: set(module.__dict__) for name, module in case.transformer.named_modules()}
        require(now == keys, f"{methods} left attributes behind")
        require(
            all(case.transformer.get_submodule(n).processor is p for n, p in processors.items()),
            f"{methods} left a processor behind",
        )


def _check_full(case: Case) -> None:
    """Every call sent to the kernels with all tiles kept is dense attention, each call and the whole model."""
    inputs = case.inputs(2)
    with planned(case.transformer, case.adapter) as attachment, recorded(attachment) as calls:
        case.run(inputs)
    require_as_planned(calls)
    wide, inputs = case.wide(), wide_inputs(inputs)
    expected = case.run(inputs, transformer=wide)
    with planned(wide, case.adapter):
        require_same(case.run(inputs, transformer=wide), expected, "all tiles kept and dense differ")


def _check_layout(case: Case) -> None:
    """A changed latent changes the one token that the grid says, and no text token."""
    inputs = case.inputs(1)
    with silenced(case.transformer), planned(case.transformer, case.adapter) as attachment:
        with recorded(attachment) as calls:
            case.run(inputs)
        longest = max(call.k.shape[2] for call in calls)

        def values(latents: Tensor) -> Tensor:
            with stopped_at(attachment, longest) as seen:
                case.run(case.with_latents(inputs, latents))
            return seen[0]

        latents = case.latents(inputs)
        still = values(latents)
        frames, height, width, before, after = [int(size) for size in attachment._slot.grid]
        visual, hit, apart = frames * height * width, set(), 0

        def tokens_along(axis: int, base: list[int]) -> Iterator[int]:
            for index in range(latents.shape[axis]):
                changed = latents.clone()
                changed[(*base[:axis], index, *base[axis + 1 :])] += 1.0
                moved = (values(changed) != still).any(1).nonzero().flatten().tolist()
                if packed and not moved:  # text has a place among the latents
                    moved = [-1]
                require(len(moved) == 1, f"latent {index} of axis {axis} moves the tokens {moved}, not one")
                yield moved[0] - before

        base, packed = [0] * latents.ndim, latents.ndim in (3, 6)
        for axis in range(1, latents.ndim if packed or case.model.reference_frames else 1):
            base[axis] = next((i for i, token in enumerate(tokens_along(axis, base)) if token == 0), 0)
        for axis in range(1, latents.ndim):
            tokens = list(tokens_along(axis, base))
            inside = [token for token in tokens if 0 <= token < visual]
            outside = [token for token in tokens if token not in inside]
            if packed:  # further images may stand beside the first, as tokens that the grid counts as text
                require(max(tokens) < visual + after, f"latents lie in token {max(tokens)}, behind all the grid counts")
            else:
                apart += len(outside)
            first = tokens[base[axis]]
            require(first == 0, f"the first visual token is {first + before}, the adapter says {before}")
            require(
                apart <= case.model.reference_frames,
                f"latents lie in token {max(outside, default=0)}, the adapter counts {visual} visual tokens",
            )
            steps = {b - a for a, b in itertools.pairwise(inside)} - {0}
            require(
                len(steps) < 2 and steps <= {1, width, height * width},
                f"along axis {axis} the latents lie in the tokens {inside}, not as in {(frames, height, width)}",
            )
            hit.update(inside)
        require({width - 1, (height - 1) * width, (frames - 1) * height * width} <= hit, "the grid is larger than that")
        require(apart == case.model.reference_frames, f"the model has {apart} reference frames among its latents")
        require(len(still) <= before + visual + after, "the sequence is longer than the grid and its text")


def _check_active(case: Case) -> str | None:
    """An active method changes the output, reaches every place once a forward, and keeps text exact."""
    if not _cases_for(case):
        return "every method with a case is refused"
    inputs = case.inputs(2)
    for tried in _cases_for(case).values():
        warm, plain = tried.warm, case.run(inputs, tried.warm)
        with attach(case.transformer, *configs_of(tried.active)) as attachment, recorded(attachment) as calls:
            changed = case.run_after(warm, inputs)
            layers = attachment._execution.layers
            report = attachment.report()
            require(not torch.equal(changed, plain), f"{tried.active} changes nothing")
            require(bool(changed.isfinite().all()), f"{tried.active} makes values that are not finite")
            reached = [step.sparse_layers for step in report.steps]
            require(reached == [len(layers)] * (warm + 1), "not every layer was reached once")
            kept = report.sparse_density
            told = (
                "keeps every tile; give the tiny model more tokens"
                if tried.thins
                else "leaves tiles out; its case says no"
            )
            require(kept is not None and (kept < 1) == tried.thins, f"{tried.active} {told}")
            case.run(inputs, step=warm + 1)
            case.run(case.inputs(1), step=warm + 2)
            require(
                torch.equal(case.run_after(warm, inputs), changed), "a run differs from the first after another batch"
            )
        for call in calls:
            require(call.q.shape[2] == call.k.shape[2], "a call is no self-attention")
            require_text_exact(call)
        require_as_planned(calls)
    return None


def _check_batch(case: Case) -> str | None:
    """Guidance in one batched call gives what two calls give, dense or not."""
    if case.model.max_batch < 2:
        return "a forward takes one row"
    wide, both = case.wide(), wide_inputs(case.inputs(2))
    for cases in ((), *((tried,) for tried in _cases_for(case).values())):
        _require_rows_alone(case, wide, both, *cases)
    return None


def _require_rows_alone(case: Case, wide: Any, both: Mapping[str, Any], *cases: MethodCase) -> None:
    methods, warm = configs_of(*(tried.active for tried in cases)), _warm(*cases)
    with attach(wide, *methods, backend="reference"):
        batched = case.run_after(warm, both, branch="cond_uncond", transformer=wide)
        for row, branch in enumerate(("uncond", "cond")):
            alone = case.run_after(warm, rows_of(both, row, 2), branch=branch, transformer=wide)
            require_same(batched[row : row + 1], alone, f"{methods} row {row} of a batch differs from itself alone")


def _check_pairs(case: Case) -> str | None:
    """Any two methods attached together: neutral, nothing changes; active, either order gives what the plan says."""
    alone = [tried for tried in _cases_for(case).values() if len(configs_of(tried.active)) == 1]
    pairs = list(itertools.combinations(alone, 2))
    if not pairs:
        return "fewer than two methods with a case apply"
    inputs = case.inputs(2)
    wide, both = case.wide(), wide_inputs(inputs)
    for one, other in pairs:
        methods, warm = configs_of(one.active, other.active), _warm(one, other)
        plain = case.run(inputs, warm)
        with attach(case.transformer, *configs_of(one.neutral, other.neutral)):
            require(torch.equal(case.run(inputs, warm), plain), f"{one.neutral} and {other.neutral} changed the output")
        with attach(case.transformer, *methods) as attachment, recorded(attachment) as calls:
            changed = case.run_after(warm, inputs)
        require(not torch.equal(changed, plain), f"{methods} change nothing")
        require(bool(changed.isfinite().all()), f"{methods} make values that are not finite")
        for call in calls:
            require_text_exact(call)
        require_as_planned(calls)
        with attach(case.transformer, *reversed(methods)):
            again = case.run_after(warm, inputs)
            require(torch.equal(again, changed), f"{methods} attached in the other order give another output")
        if case.model.max_batch > 1:
            _require_rows_alone(case, wide, both, one, other)
    return None


def _check_padding(case: Case) -> str | None:
    """What a mask hides has no influence on the video."""
    inputs = wide_inputs(case.inputs(2))
    other = case.with_other_padding(inputs)
    if other is None:
        return "no text is masked"
    wide = case.wide()
    if not torch.equal(case.run(inputs, transformer=wide), case.run(other, transformer=wide)):
        return "the untouched model lets padded text through"
    for cases in ((), *((tried,) for tried in _cases_for(case).values())):
        methods, warm = configs_of(*(tried.active for tried in cases)), _warm(*cases)
        with attach(wide, *methods, backend="reference"):
            found = [case.run_after(warm, x, transformer=wide) for x in (inputs, other)]
        require(torch.equal(*found), f"{methods}: padded text changes the output")
    return None


def _check_refused(case: Case) -> str | None:
    """A method that makes no sense here is refused with the reason, and nothing stays."""
    if not case.adapter.refused:
        return "nothing is refused"
    for name, reason in case.adapter.refused.items():
        config = registry.methods().get(name)
        if config is None:
            raise AssertionError(f"the adapter refuses {name!r}, which is no method")
        try:
            attach(case.transformer, config())
        except ConfigError as error:
            require(reason in str(error), f"the refusal of {name} does not give the reason: {error}")
        else:
            raise AssertionError(f"{name} is refused by the adapter and was attached")
        require(attachment_of(case.transformer) is None, f"the refusal of {name} left something attached")
    return None


def _check_compile(case: Case) -> None:
    """Blocks compile full-graph, to twice the graphs of the untouched model at most: dense and planned.

    One kind of block makes one graph, or more where its inputs differ: in the first block they often are slices.
    """
    inputs = case.inputs(1)
    with planned(case.transformer, case.adapter, _FromStepOne):
        eager = [case.run(inputs, step) for step in range(2)]
    with _compiled(case) as (transformer, graphs):
        case.run(inputs, transformer=transformer)
        untouched = graphs()
    with _compiled(case) as (transformer, graphs), planned(transformer, case.adapter, _FromStepOne):
        for step, expected in enumerate(eager):
            torch.testing.assert_close(case.run(inputs, step, transformer=transformer), expected)
        require(untouched > 0, "no block of its own runs")
        require(graphs() <= 2 * untouched, f"the blocks made {graphs()} graphs, the untouched ones {untouched}")


def _block_of(transformer: Any, name: str) -> str:
    """Return the name of the block that holds an attention module: of a repeated kind, or just what holds it."""
    parts = name.split(".")
    above = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    kinds = getattr(transformer, "_repeated_blocks", None) or ()
    return next((n for n in above if type(transformer.get_submodule(n)).__name__ in kinds), above[0])


@contextlib.contextmanager
def _compiled(case: Case) -> Iterator[tuple[Any, Callable[[], int]]]:
    """Give a copy of the transformer with compiled blocks, and a counter of their graphs."""
    from torch._dynamo.utils import counters

    transformer = copy.deepcopy(case.transformer)
    places = attention_modules(transformer, case.adapter)
    for name in sorted({_block_of(transformer, name) for name, _, _ in places}):
        transformer.get_submodule(name).compile(fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    try:
        yield transformer, lambda: counters["stats"]["unique_graphs"]
    finally:
        torch._dynamo.reset()


CHECKS: dict[str, Callable[[Case], str | None]] = {
    "places": _check_places,
    "neutral": _check_neutral,
    "full": _check_full,
    "layout": _check_layout,
    "active": _check_active,
    "batch": _check_batch,
    "padding": _check_padding,
    "pairs": _check_pairs,
    "refused": _check_refused,
    "compile": _check_compile,
}
"""Name -> check, in the order in which they run."""
