"""SoftPAG and PAG: guidance away from a forward whose chosen heads see themselves alone, wholly or in part."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from ...errors import ConfigError
from ...plan.call import Call
from ...plan.context import CallContext, StepContext
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan
from ..base import AttentionHandler, Handler, Model, Place
from ..config import MethodConfig
from ..options import within
from ..site import Site
from .branch import PerturbedHandler
from .guidance_config import PerturbedConfig
from .head_specs import Heads, Specs, Stacks, read_heads
from .targets import mean_values, of_mean_query, put_in_place

Target = Literal["identity", "temperature", "uniform", "mean-query"]
ANOTHER = ("uniform", "mean-query")
"""Targets that give something of their own in place of the attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftPAG(PerturbedConfig):
    """Guidance away from attention in which chosen heads are perturbed: A' = (1 - u) A + u I, so O' = (1 - u) O + u V.

    Source: HeadHunter and SoftPAG (arXiv 2506.10978). Where we depart from it: the scale of the negative prompt's
    guidance stays what it is, text rows may be left out, and windows are shares of the run.

    Attributes:
        heads: the heads, such as ``L3H1``, ``L3H0-5``, ``L3`` or ``L3-5`` (whole layers), a stack such as
            ``single_transformer_blocks`` or ``single_transformer_blocks.L3H1``, a set published for the model, a JSON
            file; several in a list or with commas. None: what is published for the model.
        u: how far, in [0, 1]. At 1 on a whole layer no logit is computed.
        rows: ``all`` tokens are perturbed, or those of the ``image`` (or video) alone, text left out.
        target: what stands in place of A: ``identity``; ``uniform``, each valid token counts alike; ``mean-query``,
            each row has the attention of the mean of all their queries. Or ``temperature``: the heads' logits are
            multiplied by 1 - u.
    """

    name: ClassVar[str] = "softpag"
    defaults: ClassVar[Mapping[str, Any]] = {"u": 0.5, "scale": 3.0, "start": 0.0, "stop": 1.0, "heads": None}

    heads: Specs | None = None
    u: Annotated[float, within(0, 1), "0 leaves attention as it is, 1 is PAG"] | None = None
    rows: Literal["all", "image"] = "all"
    target: Target = "identity"

    def __post_init__(self) -> None:
        PerturbedConfig.__post_init__(self)
        if self.target == "temperature" and self.rows == "image":
            raise ConfigError(
                "softpag.rows = 'image' can't be had with target = 'temperature', which changes whole heads; use "
                "rows = 'all', or target = 'identity'"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PAG(PerturbedConfig):
    """Guidance away from attention in which every token of chosen layers sees itself alone.

    Source: PAG (arXiv 2403.17377). Where we depart from it: the text rows of joint attention are perturbed as well,
    unless ``rows = 'image'``.

    Attributes:
        layers: the layers, such as ``L13`` or ``L3-5``, or a stack's name. None: what is published for the model.
        rows: as in `SoftPAG`.
    """

    name: ClassVar[str] = "pag"
    defaults: ClassVar[Mapping[str, Any]] = {"scale": 3.0, "start": 0.0, "stop": 1.0, "layers": None}

    layers: Specs | None = None
    rows: Literal["all", "image"] = "all"


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
        """Return the plan of an attention call with the chosen heads perturbed.

        What follows from q, k and v, and not from places and heads alone, sets ``by_place`` to False.

        Args:
            plan: what other methods planned.
            call: q, k and v.
            share: how far each head is perturbed, in [0, 1]: [H], or [B, H] where some rows alone are.
            whole: every head and row of the call is perturbed.
            context: where the call stands.
        """

    def __init__(self, config: PerturbedConfig, model: Model) -> None:
        super().__init__(config, model)
        self._heads: dict[str, Heads] = {}
        self._depths: dict[str, frozenset[int]] = {}
        self._mixes: dict[tuple[Any, ...], Tensor] = {}

    @property
    def neutral(self) -> bool:
        """Whether the settings change nothing."""
        return super().neutral or self.u == 0

    gives_another: bool = False
    """Whether heads give what is computed beside their attention, in its place."""

    def check_with(self, others: Sequence[Handler]) -> None:
        """Refuse a second method that changes what attention gave, where this one does."""
        super().check_with(others)
        if self.gives_another and any(other.name == "nag" for other in others):
            raise ConfigError(
                f"{self.name} and nag both change what an attention call gave, last of all; attach one of them, or pag"
            )

    def perturbed_layers(self, site: Site) -> Sequence[int]:
        """Return the attention layers that hold a perturbed head."""
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
        """Whether a perturbed pass runs and the block has a perturbed head."""
        passes = self._passes.get(step.transformer)
        return passes is not None and passes.perturbs and depth in self._depths[step.transformer]

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        """Perturb the layer's chosen heads."""
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
        whole = len(named) == count and rows is None
        return self.perturb(plan, call, self._share(named, count, context, rows), whole, context)

    def mix_values(self, plan: AttentionPlan, share: Tensor, whole: bool, context: CallContext) -> AttentionPlan:
        """Return a plan with V mixed into the output of its heads, in all rows or, by an option, in the image's."""
        layout, rows = context.layout, getattr(self.settings, "rows", "all")
        some = rows == "image" and layout.tokens > layout.visual_tokens
        image = image_rows(layout, str(context.device)) if some else None
        return plan.mix(share, image, only_values=whole and image is None)

    def _share(self, named: tuple[int, ...], heads: int, context: CallContext, rows: Any) -> Tensor:
        """Return u for the named heads and 0 for the others, [H], or [B, H] where some rows alone are perturbed.

        Where processes share the layer's ``heads``, those of this one.
        """
        key = named, heads, context.device, rows and (rows[0].start, rows[0].stop), context.batch, context.row
        if key not in self._mixes:
            with torch.inference_mode(False):
                share = torch.zeros(heads)
                share[list(named)] = self.u
                if rows is not None:
                    chosen, called = range(rows[0].start, rows[0].stop), _rows_of_call(context, rows[1])
                    share = torch.stack([share * (row in chosen) for row in called])
                share = share if context.heads is None else share[..., context.heads.own]
                self._mixes[key] = share.to(context.device)
        return self._mixes[key]

    def reset(self) -> None:
        """Forget the last step."""
        super().reset()
        self._mixes.clear()


class SoftPAGHandler(PerturbedHeadsHandler):
    """SoftPAG on one model."""

    config_type: ClassVar[type[MethodConfig]] = SoftPAG
    option = "heads"
    settings: SoftPAG

    @property
    def u(self) -> float:  # type: ignore[override]
        """How far heads are perturbed."""
        return self.settings.u or 0.0

    def perturb(
        self, plan: AttentionPlan, call: Call, share: Tensor, whole: bool, context: CallContext
    ) -> AttentionPlan:
        """Put V, or what the target gives, in place of a share of the heads' attention, or scale their logits."""
        target, layout = self.settings.target, context.layout
        if target == "temperature":
            return plan.scale(1 - share)
        if target == "identity":
            return self.mix_values(plan, share, whole and self.u == 1, context)
        some = self.settings.rows == "image" and layout.tokens > layout.visual_tokens
        image = image_rows(layout, str(context.device)) if some else None
        other = mean_values(call) if target == "uniform" else of_mean_query(call, image)
        return put_in_place(plan, other, share, image, whole=whole and self.u == 1)

    @property
    def gives_another(self) -> bool:  # type: ignore[override]
        """Whether the target is none of identity and temperature."""
        return self.settings.target in ANOTHER

    @property
    def by_place(self) -> bool:  # type: ignore[override]
        """Whether the perturbation follows from places alone: the mean query needs the others."""
        return self.settings.target != "mean-query"

    def describe_perturbation(self) -> str:
        """Return in words what is perturbed."""
        how = "" if self.settings.target == "identity" else f" to {self.settings.target}"
        return f"{', '.join(self.specs or ()) or 'no head'}{how} with u = {self.u:g}, scale {self.settings.scale}"


class PAGHandler(PerturbedHeadsHandler):
    """PAG on one model."""

    config_type = PAG
    settings: PAG

    def perturb(
        self, plan: AttentionPlan, call: Call, share: Tensor, whole: bool, context: CallContext
    ) -> AttentionPlan:
        """Put V in the place of the output of the layer's perturbed heads."""
        return self.mix_values(plan, share, whole, context)


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


def _rows_of_call(context: CallContext, batch: int) -> range:
    """Return the rows of the forward that an attention call has: all, or one of those that are attended by itself."""
    return range(batch) if context.batch == batch else range(context.row, context.row + context.batch)
