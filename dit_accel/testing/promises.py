"""What every method promises on a tiny model, each promise once: `check_method` runs them, our tests over a table."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attachment.attachment import attach
from ..attachment.backends import Backend
from ..attachment.site import find_blocks
from ..errors import ConfigError
from ..methods.base import Phase, Place
from ..methods.caches.engine import StepCacheHandler
from ..methods.config import MethodConfig
from ..methods.find import attention_modules
from ..methods.guidance.branch import PerturbedHandler
from ..methods.guidance.softpag import SoftPAG
from ..methods.registry import handler_of
from ..methods.toml import from_toml, to_toml
from .method_cases import MethodCase, configs_of
from .recording import counted, recorded, require, require_as_planned, require_same, require_text_exact
from .runs import BRANCHES, Settings, attached, break_off, moved, note_plain, outputs, prompts
from .tiny_models import Case, wide_inputs

Promise = Callable[[Case, MethodCase], str | None]
"""What checks one promise: it raises `AssertionError`, or returns why the promise does not apply."""


def check_neutral(case: Case, tried: MethodCase) -> None:
    """Neutral settings change no bit, run no further forward, and leave nothing behind."""
    require_neutral(case, tried.neutral, tried.warm + 2)


def require_neutral(case: Case, settings: Settings, steps: int = 2) -> None:
    """Require that settings change no bit of a short run and of a batch, stay dense, and leave nothing behind."""
    plain, both = note_plain(case, steps), case.inputs(2)
    name = " and ".join(config.name for config in configs_of(settings)) or "an attachment of no method"
    with attached(case, settings) as attachment:
        for step, (out, expected) in enumerate(zip(outputs(case, steps), plain, strict=True)):
            require(torch.equal(out, expected), f"{name} changed step {step // 2}, with neutral settings")
        report, ran = attachment.report(), attachment.engine.recorder.forwards_run
        require(ran == 2 * steps, f"{name} ran {ran} forwards in place of {2 * steps}, with neutral settings")
        require(report.density == 1.0, f"{name} did not stay dense, with neutral settings")
        together = case.run(both, branch="cond_uncond")
        require(torch.equal(together, case.plain["both"]), f"{name} changed a batch, with neutral settings")


def check_active(case: Case, tried: MethodCase) -> None:
    """Active settings change what the model gives to other finite values, and detaching undoes that bit for bit."""
    steps = tried.warm + 2
    plain = note_plain(case, steps)
    with attached(case, tried.active):
        out = outputs(case, steps)
    require(not torch.equal(out, plain), f"{tried.config.name} changes nothing")
    require(bool(out.isfinite().all()), f"{tried.config.name} makes values that are not finite")
    require(torch.equal(outputs(case, steps), plain), f"{tried.config.name} left the output changed")


def check_planned(case: Case, tried: MethodCase) -> str | None:
    """A method on attention plans every layer once a forward, leaves text exact, and gets what it planned."""
    handler = handler_of(tried.config)
    if Place.ATTENTION not in tried.places or handler.phase is Phase.GUIDANCE or not tried.everywhere:
        return "it does not plan every attention call"
    inputs = case.inputs(2)
    with attached(case, tried.active) as attachment, recorded(attachment) as calls:
        first = case.run_after(tried.warm, inputs)
        report, layers = attachment.report(), len(attachment.engine.layers)
        planned = list(calls)
        case.run(case.inputs(1), step=tried.warm + 1)
        again = case.run_after(tried.warm, inputs)
    require(torch.equal(first, again), f"{tried.config.name}: a run differs after a forward of another batch")
    reached = [step.sparse_layers for step in report.steps]
    require(reached == [layers] * (tried.warm + 1), f"the steps reached {reached} layers, not {layers} each")
    density, problem = report.sparse_density, "leaves tiles out; its case says no"
    if tried.thins:
        problem = "keeps every tile; give the tiny model more tokens"
    require(density is not None and (density < 1) == tried.thins, f"{tried.config.name} {problem}")
    for call in planned:
        require(call.q.shape[2] == call.k.shape[2], "a call is not self-attention")
        require_text_exact(call)
    require_as_planned(planned)
    return None


def check_runs(case: Case, tried: MethodCase) -> None:
    """A run is the same bit for bit whatever ran before it under its attachment."""
    steps, both, name = tried.warm + 2, case.inputs(2), tried.config.name
    few = max(2, tried.warm + 1)  # until it acts; of the first of the runs below all steps are compared
    with attached(case, tried.active):
        fresh = outputs(case, steps, prompt=1)
    twin = copy.deepcopy(case.transformer)
    with attached(case, tried.active) as attachment, attach(twin, *configs_of(tried.active), preset="none"):
        first = outputs(case, steps)
        require(not torch.equal(first, fresh), "another prompt gives the same")
        require(torch.equal(outputs(case, steps, prompt=1), fresh), f"{name}: a run differs after a whole run")
        for what, before in {
            "a run that was stopped": lambda: outputs(case, steps - 1),
            "two steps of a batch": lambda: [case.run(both, step, "cond_uncond") for step in range(2)],
            "a run without a negative prompt": lambda: outputs(case, few, branches=("cond",)),
            "a forward that raised": lambda: break_off(case),
            "a run of another model": lambda: outputs(case, few, transformer=twin),
        }.items():
            before()
            again = outputs(case, few, prompt=1)
            require(torch.equal(again, fresh[: 2 * few]), f"{name}: a run differs after {what}")
        outputs(case, 1, prompt=1)
        attachment.reset()
        require(torch.equal(outputs(case, steps), first), f"{name}: a run differs after a reset")


def check_branches(case: Case, tried: MethodCase) -> None:
    """The prompt's forwards give the same whether those of a negative prompt run between them or not."""
    steps = tried.warm + 2
    with attached(case, tried.active):
        both = outputs(case, steps)
    with attached(case, tried.active):
        alone = outputs(case, steps, branches=("cond",))
    require(torch.equal(both[::2], alone), f"{tried.config.name}: a negative prompt changes the prompt's forwards")


def check_batch(case: Case, tried: MethodCase) -> str | None:
    """A forward that holds both prompts gives what two forwards give, the prompt's first."""
    return require_rows_alone(case, configs_of(tried.active), tried.warm, "reference")


def check_free(case: Case, tried: MethodCase) -> str | None:
    """With ``mode="free"`` the negative prompt's rows alone are perturbed, and no further forward runs."""
    if not issubclass(handler_of(tried.config), PerturbedHandler):
        return "it perturbs no forward"
    if case.model.max_batch < 2:
        return "a forward takes one row"
    try:
        free = dataclasses.replace(tried.config, mode="free", scale=None, rescale=0.0)  # type: ignore[call-arg]
    except ConfigError as refused:
        return str(refused)
    wide, (both, _) = case.wide(), _both(case)
    plain = case.run(both, branch="cond_uncond", transformer=wide)
    with attach(wide, free, preset="none", backend="reference") as attachment:
        together = case.run(both, branch="cond_uncond", transformer=wide)
        ran = attachment.engine.recorder.forwards_run
    cond = _row_of_prompt(case)
    require_same(together[cond], plain[cond], f"{free}: the prompt's row of a forward for both changes")
    require(not torch.equal(together[1 - cond], plain[1 - cond]), f"{free}: the negative prompt's row stays")
    require(ran == 1, f"{free} ran {ran} forwards, not one")
    return require_rows_alone(case, (free,), tried.warm, "reference")


def require_rows_alone(
    case: Case, methods: tuple[MethodConfig, ...], warm: int, backend: Backend, transformer: Any = None
) -> str | None:
    """Require that a forward for both prompts gives each row what forwards in turn give it."""
    if case.model.max_batch < 2:
        return "a forward takes one row"
    wide, (both, rows) = transformer or case.wide(), _both(case)
    with attach(wide, *methods, preset="none", backend=backend):
        together = case.run_after(warm, both, "cond_uncond", wide)
    with attach(wide, *methods, preset="none", backend=backend):
        for step in range(warm + 1):
            alone = {name: case.run(rows[name], step, name, wide) for name in BRANCHES}
    for name, row in zip(BRANCHES, (_row_of_prompt(case), 1 - _row_of_prompt(case)), strict=True):
        require_same(together[row : row + 1], alone[name], f"{methods}: the {name} row of a batch and alone differ")
    return None


def _row_of_prompt(case: Case) -> int:
    """Return which row of a forward for both prompts holds the prompt."""
    return 0 if case.adapter.guidance.first_rows == "cond" else 1


def _both(case: Case) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the inputs of a forward for both prompts, in float64, and those of each."""
    both, at = wide_inputs(case.inputs(2)), _row_of_prompt(case)
    return both, {"cond": case.row(both, at), "uncond": case.row(both, 1 - at)}


def check_skips(case: Case, tried: MethodCase) -> str | None:
    """A step cache computes the first ``warm`` steps, bit for bit, skips the next, and runs no more than it says."""
    if not issubclass(handler_of(tried.config), StepCacheHandler) or "cache" not in handler_of(tried.config).exclusive:
        return "it skips no forward of the prompt"
    name, warm, rows = tried.config.name, tried.warm, case.inputs(1)
    plain = [case.run(moved(case, rows, step), step) for step in range(warm + 1)]
    layers = [layer for layer, _, _ in attention_modules(case.transformer, case.adapter)]
    with counted(case.transformer, layers) as ran, attached(case, tried.active):
        outs = [case.run(moved(case, rows, step), step) for step in range(warm + 1)]
        again = case.run(moved(case, rows, 0), 0)
    expected = (warm + 1) * len(layers) + len(_layers_of_skipped_step(case, layers, tried))
    require(not torch.equal(outs[warm], plain[warm]), f"{name} did not skip step {warm}")
    require(len(ran) == expected, f"{name}: {len(ran)} attention calls ran, the cache says {expected}")
    for step, out in enumerate((*outs[:warm], again)):
        require(torch.equal(out, plain[step % warm]), f"{name} changed step {step % warm}, before it skipped any")
    return None


def _layers_of_skipped_step(case: Case, layers: list[str], tried: MethodCase) -> list[str]:
    """Return the attention layers that a skipped step runs: those in the blocks that it runs, and in no block."""
    if not tried.still_run:
        return []
    blocks = [block.name for block in find_blocks(case.adapter, case.transformer)]
    skipped = set(blocks) - {blocks[index] for index in tried.still_run}
    return [layer for layer in layers if not any(layer.startswith(f"{block}.") for block in skipped)]


def check_beside_guidance(case: Case, tried: MethodCase) -> str | None:
    """Guidance away from a perturbation of nothing adds nothing to what a method gives, from the middle of a run on."""
    wide, rows = case.wide(), wide_inputs(case.inputs(1))
    nothing, active = SoftPAG(heads="L1", u=1e-12, scale=3.0, start=0.3), configs_of(tried.active)
    if not handler_of(nothing).exclusive.isdisjoint(handler_of(tried.config).exclusive):
        return "it can't stand beside guidance"
    runs: list[list[Tensor]] = []
    for methods in (active, (*active, nothing)):
        try:
            attachment = attach(wide, *methods, preset="none", backend="torch")
        except ConfigError as refused:
            return str(refused)
        with attachment:
            runs.append(
                [case.run(moved(case, rows, 4 * step), step, transformer=wide) for step in range(tried.warm + 5)]
            )
    for step, (alone, guided) in enumerate(zip(*runs, strict=True)):
        away = f"guidance away from nothing moves the output of {active} in step {step}"
        same = torch.allclose(guided, alone, rtol=1e-4, atol=1e-5)
        require(same, f"{away}: a perturbed forward learns, or leaves out something else")
    return None


def check_not_a_number(case: Case, tried: MethodCase) -> None:
    """What is not a number comes out, not a value that hides it, and the next run is as it was."""
    steps, rows = tried.warm + 1, prompts(case)["cond"]
    with attached(case, tried.active):
        first = outputs(case, steps, branches=("cond",))
        for step in range(tried.warm):
            case.run(moved(case, rows, step), step)
        out = case.run(case.with_latents(rows, case.latents(rows) * torch.nan), tried.warm)
        require(not bool(out.isfinite().any()), f"{tried.config.name} gives numbers for latents that are none")
        again = outputs(case, steps, branches=("cond",))
    require(torch.equal(first, again), f"{tried.config.name}: a run differs after latents that are no numbers")


def check_gradients(case: Case, tried: MethodCase) -> str | None:
    """Each weight that has a gradient has a finite one, and a forward that trains leaves no trace in the next run."""
    if not tried.trains:
        with attached(case, tried.active), contextlib.suppress(ConfigError):
            _gradients(case, tried.warm + 1)
            raise AssertionError(f"{tried.config.name} trains, though its case says that it is refused")
        return None
    expected = _gradients(case, tried.warm + 1)
    with attached(case, tried.active):
        first = outputs(case, tried.warm + 1)
        gradients = _gradients(case, tried.warm + 1)
        require(torch.equal(outputs(case, tried.warm + 1), first), f"{tried.config.name}: a run differs after training")
    require(gradients.keys() == expected.keys(), f"{tried.config.name}: other weights have gradients")
    for name, gradient in gradients.items():
        require(bool(gradient.isfinite().all()), f"{tried.config.name}: the gradient of {name} is not finite")
    if Place.ATTENTION not in tried.places and Place.POSITIONS not in tried.places:
        same = all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())
        require(same, f"{tried.config.name} changes the gradients of a model that trains")
    return None


def _gradients(case: Case, step: int) -> dict[str, Tensor]:
    """Return the gradient of each weight after one forward and backward at a step."""
    weights, inputs = dict(case.transformer.named_parameters()), case.inputs(1)
    trained = case.with_latents(inputs, case.latents(inputs).requires_grad_())
    out = case.run(trained, step, differentiate=True)
    gradients = torch.autograd.grad(out.float().square().mean(), [*weights.values()], allow_unused=True)
    return {name: gradient for name, gradient in zip(weights, gradients, strict=True) if gradient is not None}


def check_memory(case: Case, tried: MethodCase) -> str | None:
    """The report says how many bytes a method holds from step to step."""
    if tried.held is None:
        return "its case does not say how many bytes it holds"
    with attached(case, tried.active) as attachment:
        outputs(case, tried.warm + 2)
        held = dict(attachment.report().state_bytes).get(tried.config.name, 0)
    require(held == tried.held, f"{tried.config.name} holds {held} bytes; its case says {tried.held}")
    return None


def check_toml(case: Case, tried: MethodCase) -> None:
    """A config comes back from the TOML that is written of it, but for what has no place in TOML."""
    for settings in (tried.neutral, tried.active):
        configs = configs_of(settings)
        back = from_toml(to_toml(configs))
        same = [config.to_dict() for config in back] == [config.to_dict() for config in configs]
        require(same, f"{settings} came back from TOML as {back}")


def check_refusals(case: Case, tried: MethodCase) -> str | None:
    """A bad option is refused by one sentence that names the method, the option and the value."""
    for options, *words in tried.bad:
        try:
            config = type(tried.config)(**options)
        except ConfigError as error:
            text, (name, value) = str(error), list(options.items())[-1]
            lacking = [word for word in (tried.config.name, name, *words) if word not in text]
            spelled = [value, *([list(value), *value] if isinstance(value, tuple) else [])]
            if not words and not any(f"got {form!r}" in text or f"{name} = {form!r}" in text for form in spelled):
                lacking.append(repr(value))
            require(not lacking, f"the refusal of {options} does not say {', '.join(lacking)}: {text}")
        else:
            raise AssertionError(f"{options} was taken: {config}")
    return None if tried.bad else "its case names no bad options"


def check_companions(case: Case, tried: MethodCase) -> str | None:
    """Beside each companion the method gives finite values, the same in whatever order they are attached."""
    for other in tried.beside:
        require_together(case, configs_of(tried.active, other), tried.warm)
    return None if tried.beside else "its case names no companions"


def require_together(case: Case, methods: tuple[MethodConfig, ...], warm: int) -> None:
    """Require that methods act together: as their plan says, finite, and the same in either order."""
    inputs, plain = case.inputs(2), case.run(case.inputs(2), warm)
    with attach(case.transformer, *methods, preset="none") as attachment, recorded(attachment) as calls:
        changed = case.run_after(warm, inputs)
    require(not torch.equal(changed, plain), f"{methods} change nothing")
    require(bool(changed.isfinite().all()), f"{methods} make values that are not finite")
    planned = [call for call in calls if call.context.beside is None]
    for call in planned:
        require_text_exact(call)
    require_as_planned(planned)
    with attach(case.transformer, *reversed(methods), preset="none"):
        again = case.run_after(warm, inputs)
    require(torch.equal(again, changed), f"{methods} attached in the other order give another output")


PROMISES: dict[str, Promise] = {
    "neutral": check_neutral, "active": check_active, "planned": check_planned, "skips": check_skips,
    "runs": check_runs, "branches": check_branches, "batch": check_batch, "free": check_free,
    "beside guidance": check_beside_guidance, "not a number": check_not_a_number, "gradients": check_gradients,
    "memory": check_memory, "toml": check_toml, "refusals": check_refusals, "companions": check_companions,
}  # fmt: skip
"""Name -> what checks the promise, in the order in which `check_method` runs them."""
