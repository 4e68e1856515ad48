"""SEG: guidance away from attention whose queries are blurred over the picture, so that its energy is smoother."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ...plan.call import Call
from ...plan.context import CallContext
from ...plan.plan import AttentionPlan
from ..options import gt
from .guidance_config import PerturbedConfig
from .head_specs import Specs
from .perturbed_heads import PerturbedHeadsHandler
from .targets import ENDLESS, blurred_queries


@dataclass(frozen=True, slots=True, kw_only=True)
class SEG(PerturbedConfig):
    """Guidance away from attention in which chosen layers' queries are blurred over height and width.

    Source: smoothed energy guidance (arXiv 2408.00760). Where we depart from it: queries are blurred after norm and
    rotary positions, frame by frame of a video, and text's queries stay; the window is a share of the run.

    Attributes:
        layers: the layers, such as ``L13`` or ``L3-5``, or a stack's name. None: what is published for the model.
        sigma: standard deviation of the Gaussian in tokens, by which, and not by ``scale``, the paper tunes; above 9999
            each frame's queries are their mean.
    """

    name: ClassVar[str] = "seg"
    defaults: ClassVar[Mapping[str, Any]] = {"scale": 3.0, "start": 0.0, "stop": 1.0, "layers": None}

    layers: Specs | None = None
    sigma: Annotated[float, gt(0)] = 1e4


class SEGHandler(PerturbedHeadsHandler):
    """SEG on one model."""

    config_type = SEG
    settings: SEG
    by_place = False

    def perturb(
        self, plan: AttentionPlan, call: Call, share: Tensor, whole: bool, context: CallContext
    ) -> AttentionPlan:
        """Put blurred queries in the place of those of the layer's perturbed heads."""
        blurred = blurred_queries(call, context.layout, self.settings.sigma)
        return plan.query(torch.where(share.reshape(-1, share.shape[-1])[:, :, None, None] > 0, blurred, call.q))

    def describe_perturbation(self) -> str:
        how = "each frame's mean" if self.settings.sigma > ENDLESS else f"blurred by {self.settings.sigma:g} tokens"
        return f"queries of {', '.join(self.specs or ()) or 'no layer'} {how}, scale {self.settings.scale}"
