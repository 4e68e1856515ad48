"""Short runs of a tiny model, as a pipeline makes them, with methods attached or without."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..attachment.attachment import Attachment, attach
from ..methods.config import MethodConfig
from ..methods.find import attention_modules
from .method_cases import configs_of
from .recording import require
from .tiny_models import Case

BRANCHES = ("cond", "uncond")

Settings = MethodConfig | tuple[MethodConfig, ...]


def outputs(
    case: Case, steps: int, *, prompt: int = 0, branches: tuple[str, ...] = BRANCHES, transformer: Any = None
) -> Tensor:
    """Return what the forwards of a short run give, [steps * branches, ...], on latents that move."""
    rows = prompts(case, prompt)
    forwards = [(moved(case, rows[name], step), step, name) for step in range(steps) for name in branches]
    return torch.stack([case.run(inputs, step, name, transformer) for inputs, step, name in forwards])


def note_plain(case: Case, steps: int) -> Tensor:
    """Return what a short run of the untouched model gives; that and a batch's output are computed once a case."""
    if steps not in case.plain:
        case.plain[steps] = outputs(case, steps)
        case.plain["both"] = case.run(case.inputs(2), branch="cond_uncond")
    return case.plain[steps]


def prompts(case: Case, prompt: int = 0) -> dict[str, dict[str, Any]]:
    """Return the inputs of a prompt and of its negative one, which share their latents."""
    cond, uncond = (case.inputs(1, 1 + 10 * prompt + number) for number in range(2))
    return {"cond": cond, "uncond": case.with_latents(uncond, case.latents(cond))}


def moved(case: Case, inputs: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return the inputs of a step: were the latents the same in each, caches could not tell how fast they change."""
    return case.with_latents(inputs, case.latents(inputs) * (1 - 0.05 * step))


class _BrokenOffError(Exception):
    """Ends a forward from within."""


def break_off(case: Case) -> None:
    """Run a forward that raises in its last attention layer."""

    def stop(*_: Any) -> None:
        raise _BrokenOffError

    *_, (name, _, _) = attention_modules(case.transformer, case.adapter)
    handle = case.transformer.get_submodule(name).register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(_BrokenOffError):
            case.run(case.inputs(1))
    finally:
        handle.remove()


@contextlib.contextmanager
def attached(case: Case, settings: Settings) -> Iterator[Attachment]:
    """Attach settings to a case's transformer; require that detaching leaves nothing behind."""
    before = _traces(case)
    with attach(case.transformer, *configs_of(settings), preset="none") as attachment:
        yield attachment
    require(_traces(case) == before, f"{settings} left attributes or a processor behind")


def _traces(case: Case) -> dict[str, Any]:
    """Return what an attachment might leave: the names of each module's attributes, and its processor."""
    return {
        name: (set(vars(module)), id(getattr(module, "processor", None)))
        for name, module in case.transformer.named_modules()
    }
