"""SoftPAG and PAG: guidance away from a forward whose chosen heads see themselves alone, wholly or in part."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from ...errors import ConfigError
from ...plan.call import Call
from ...plan.context import CallContext
from ...plan.plan import AttentionPlan
from ..base import Model
from ..config import MethodConfig
from ..options import within
from .guidance_config import PerturbedConfig
from .head_specs import Specs
from .perturbed_heads import PerturbedHeadsHandler
from .targets import LAST_CHANGE, mean_values, of_mean_query, put_in_place

Target = Literal["identity", "temperature", "uniform", "mean-query"]
ANOTHER = ("uniform", "mean-query")
"""Targets that replace the attention's output by another."""


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


class SoftPAGHandler(PerturbedHeadsHandler):
    """SoftPAG on one model."""

    config_type: ClassVar[type[MethodConfig]] = SoftPAG
    option = "heads"
    settings: SoftPAG

    def __init__(self, config: SoftPAG, model: Model) -> None:
        super().__init__(config, model)
        if self.settings.target in ANOTHER:
            self.exclusive = self.exclusive | LAST_CHANGE  # type: ignore[misc]

    @property
    def u(self) -> float:  # type: ignore[override]
        """How far heads are perturbed."""
        return self.settings.u or 0.0

    def perturb(
        self, plan: AttentionPlan, call: Call, share: Tensor, whole: bool, context: CallContext
    ) -> AttentionPlan:
        """Put V, or what the target gives, in place of a share of the heads' attention, or scale their logits."""
        target = self.settings.target
        if target == "temperature":
            return plan.scale(1 - share)
        if target == "identity":
            return self.mix_values(plan, share, whole and self.u == 1, context)
        image = self.image_alone(context)
        other = mean_values(call) if target == "uniform" else of_mean_query(call, image)
        return put_in_place(plan, other, share, image, whole=whole and self.u == 1)

    @property
    def by_place(self) -> bool:  # type: ignore[override]
        """Whether the perturbation follows from places alone: the mean query needs the others."""
        return self.settings.target != "mean-query"

    def describe_perturbation(self) -> str:
        how = "" if self.settings.target == "identity" else f" to {self.settings.target}"
        return f"{', '.join(self.specs or ()) or 'no head'}{how} with u = {self.u:g}, scale {self.settings.scale}"


class PAGHandler(PerturbedHeadsHandler):
    """PAG on one model."""

    config_type = PAG
    settings: PAG

    def perturb(
        self, plan: AttentionPlan, call: Call, share: Tensor, whole: bool, context: CallContext
    ) -> AttentionPlan:
        return self.mix_values(plan, share, whole, context)
