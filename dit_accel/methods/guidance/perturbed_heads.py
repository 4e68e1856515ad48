"""Guidance away from perturbed heads: what all such methods share, whatever becomes of the heads."""

from abc import abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...plan.call import Call
from ...plan.context import CallContext, StepContext
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan
from ...plan.rows_apart import with_rows_apart
from ..base import AttentionHandler, Model, Place
from ..site import Site
from .branch import PerturbedHandler
from .guidance_config import PerturbedConfig
from .head_specs import Heads, Stacks, read_heads


class PerturbedHeadsHandler(PerturbedHandler, AttentionHandler):
    """Guidance away from perturbed heads on one model; who writes one says by `perturb` what becomes of them."""

    places = frozenset({Place.ATTENTION, Place.FORWARD})
    by_place = True

    search = ", or search with `dit-accel tune heads`"

    u: float = 1.0
    """How far they are perturbed, in [0, 1]; 0 changes nothing."""

    @abstractmethod
    def perturb(
        self, plan: AttentionPlan, call: Call, share: Tensor, whole: bool, context: CallContext
    ) -> AttentionPlan:
        """Return the plan of an attention call with the chosen heads perturbed, in every row of the batch.

        Where some rows alone are perturbed the core has the others follow ``plan``. What follows from q, k and v, and
        not from places and heads alone, sets ``by_place`` to False.

        ``share``: how far each head is perturbed, in [0, 1], [H].
        """

    def __init__(self, config: PerturbedConfig, model: Model) -> None:
        super().__init__(config, model)
        self._heads: dict[str, Heads] = {}
        self._depths: dict[str, frozenset[int]] = {}
        self._shares: dict[tuple[Any, ...], Tensor] = {}

    @property
    def neutral(self) -> bool:
        return super().neutral or self.u == 0

    def perturbed_layers(self, site: Site) -> Sequence[int]:
        heads = self._heads[site.name] = read_heads(
            self.specs or (), stacks_of(site, self.model), f"{self.name}.{self.option}", self.published
        )
        sides = [
            at for at, name in site.attention.items() if any(fnmatch(name, of) for of in site.adapter.side_attention)
        ]
        main = min(sides, default=len(site.attention))
        self._depths[site.name] = frozenset(layer if layer < main else layer - main for layer in heads)
        return list(heads)

    def is_active(self, step: StepContext, depth: int) -> bool:
        passes = self._passes.get(step.transformer)
        return passes is not None and passes.perturbs and depth in self._depths[step.transformer]

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        named = self._heads[context.transformer].get(context.layer)
        rows = self._passes[context.transformer].rows
        if named is None:
            return plan
        count = call.q.shape[1] if context.heads is None else context.heads.total
        if named[-1] >= count:
            raise ConfigError(
                f"{self.name}.{self.option} names head {named[-1]} of attention layer {context.layer}, which has heads "
                f"0 to {count - 1}; stay in that range"
            )
        perturbed = self.perturb(plan, call, self._share(named, count, context), len(named) == count, context)
        if rows is None:
            return perturbed
        chosen, called = range(rows[0].start, rows[0].stop), range(rows[1])
        if context.batch != rows[1]:  # each row is attended by itself
            called = range(context.row, context.row + context.batch)
        return with_rows_apart(plan, perturbed, torch.tensor([row in chosen for row in called]).to(call.q.device), call)

    def mix_values(self, plan: AttentionPlan, share: Tensor, whole: bool, context: CallContext) -> AttentionPlan:
        """Return a plan with V mixed into the output of its heads, in all rows or, by an option, in the image's."""
        image = self.image_alone(context)
        return plan.mix(share, image, only_values=whole and image is None)

    def image_alone(self, context: CallContext) -> Tensor | None:
        """Return which tokens are perturbed, bool [S], if an option leaves out text that there is; None: all."""
        layout = context.layout
        if getattr(self.settings, "rows", "all") == "all" or layout.tokens == layout.visual_tokens:
            return None
        return image_rows(layout, str(context.device))

    def _share(self, named: tuple[int, ...], heads: int, context: CallContext) -> Tensor:
        """Return u for the named heads and 0 for the others, [H]; where processes share heads, for this process's."""
        key = named, heads, context.device
        if key not in self._shares:
            with torch.inference_mode(False):
                share = torch.zeros(heads)
                share[list(named)] = self.u
                self._shares[key] = share[slice(None) if context.heads is None else context.heads.own].to(
                    context.device
                )
        return self._shares[key]

    def reset(self) -> None:
        super().reset()
        self._shares.clear()


def stacks_of(site: Site, model: Model) -> Stacks:
    """Return a transformer's attention layers, as specs name them; raise `ConfigError` if ``attach`` left some out."""
    names = site.attention
    if sorted(names) != list(range(len(names))):
        missing = next(index for index in range(max(names) + 1) if index not in names)
        raise ConfigError(
            f"layers leaves out attention layer {missing}, by whose numbers heads are named; leave layers unset and "
            "name the heads alone"
        )
    attended = {name for name, module in site.transformer.named_modules() if hasattr(module, "processor")}
    return Stacks(
        names=[names[index] for index in range(len(names))], heads=model.heads, others=attended - set(names.values())
    )


@lru_cache(maxsize=16)
def image_rows(layout: TokenLayout, device: str) -> Tensor:
    """Return which tokens are the image's, bool [S]."""
    with torch.inference_mode(False):
        rows = torch.zeros(layout.tokens, dtype=torch.bool, device=device)
        rows[layout.visual] = True
        return rows
