"""Step caches driven forward by forward on made-up outputs, without a model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dit_accel.adapters.adapter import Adapter
from dit_accel.adapters.guidance import Guidance
from dit_accel.methods.base import Handler, Model
from dit_accel.methods.caches.cache_config import StepCacheConfig
from dit_accel.methods.registry import handler_of
from dit_accel.methods.site import ForwardContext

ADAPTER = Adapter(name="made-up", transformers=("MadeUp",), self_attention=("blocks.*.attn",))

Output = Callable[[int, str], Any]
"""(step, branch) -> what the model would give."""


class Driven:
    """A step cache whose forwards are made up; `ran` lists the (step, branch) that were computed."""

    def __init__(
        self, config: StepCacheConfig, output: Output, others: Sequence[Handler] = (),
        recipe: Mapping[str, Any] | None = None, model: Any = None, guidance: Guidance | None = None,
    ) -> None:  # fmt: skip
        adapter = replace(ADAPTER, recipes={config.name: recipe or {}}, guidance=guidance or ADAPTER.guidance)
        described = Model(adapter=adapter, family=None, heads=1, layers=1)
        self.handler: Any = handler_of(config)(config, described)
        self.handler.check_with(others)
        self.output = output
        self.model = model or torch.nn.Identity()
        self.ran: list[tuple[int, str]] = []
        self._around: dict[str, Any] = {}

    def forward(
        self, step: int, latents: Any, branch: str = "cond", *, steps: int | None = 10, sigma: float | None = None,
        noise: Any = "flow", transformer: str = "transformer", training: bool = False,
    ) -> Any:  # fmt: skip
        """One forward of a pipeline, and what it gives."""
        self.install(transformer)
        context = ForwardContext(
            transformer=transformer, branch=branch, step_index=step, num_inference_steps=steps, sigma=sigma,
            noise=noise, layout=None, batch=1, training=training, tells_step=True, inputs={"hidden_states": latents},
        )  # fmt: skip

        def run(**changed: Any) -> Any:
            self.ran.append((step, branch))
            return self.output(step, branch)

        return self._around[transformer](context, run)

    def install(self, *transformers: str) -> None:
        """Put the cache onto transformers of these names, unless it is."""
        for name in transformers:
            if name not in self._around:
                site = SimpleNamespace(
                    name=name, adapter=ADAPTER, branch=nullcontext, transformer=self.model,
                    around_forward=lambda function, name=name: self._around.update({name: function}),
                )  # fmt: skip
                self.handler.install(site)

    def drawn(self, branch: str = "cond", steps: int = 10) -> str:
        """The computed (#) and skipped (.) steps of a branch."""
        return "".join("#" if (step, branch) in self.ran else "." for step in range(steps))


def run_through(driven: Driven, latents: Callable[[int], Tensor], steps: int = 10, branches: Sequence[str] = ("cond",)):
    """Run a whole generation, and return step -> branch -> output."""
    return [
        {branch: driven.forward(step, latents(step), branch, steps=steps)[0] for branch in branches}
        for step in range(steps)
    ]


def line(step: int, branch: str) -> tuple[Tensor]:
    """An output on a line in the step, in another place for each branch."""
    return (torch.full((1, 2, 3), float(step) + 100 * (branch != "cond")),)


def still(step: int) -> Tensor:
    """Latents that do not change."""
    return torch.zeros(1, 2, 3)


def values_of(driven: Driven) -> list[float]:
    """What a cache measured in a run, where it did."""
    return [entry["value"] for entry in driven.handler.report().data["forwards"] if entry["value"] is not None]
