"""UltraViCo: videos longer than the model was trained on, by decaying positive logits between far frames.

Source: UltraViCo (arXiv 2511.20123), by its published formula and defaults. Where we depart from its released code: the
distance is one of frames, as in the paper, not of flattened tokens (the two differ where frames are L / 2 apart, within
a frame); any size and model; and it composes with sparse methods, whose lists drop first and whose survivors decay.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import torch
from dit_accel_kernels import FrameDecay
from torch import Tensor

from ...errors import ConfigError
from ...plan.call import Call
from ...plan.context import CallContext
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan, RowOverride
from ...rules.ultravico import ByRatio, DecayRule, output_frames, strengths
from ..base import AttentionHandler, Model, Phase
from ..config import MethodConfig
from ..options import ge, gt, le
from ..saving import Saving

BY_RATIO: ByRatio = ((2.0, 0.9, None),)
"""The paper's safe strengths, no bands: where a recipe has no ``by_ratio``.

That is no option but a recipe's table of (extension ratio, alpha, beta): what is unset is taken from the row of the
nearest ratio.
"""

SAFE_BETA = 0.6
"""What beta is where a period is given and no beta is published."""


Strength = Annotated[float, gt(0), le(1), "1 decays nothing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UltraViCo(MethodConfig):
    """Videos longer than the model was trained on, by decaying logits between far frames (arXiv 2511.20123).

    A logit x between two frames more than half the trained length apart becomes min(x, t x), so that positive ones
    shrink and no others change. Text, sound and reference tokens never decay. A clip that is no longer than the trained
    ones is left as it is. An option left unset takes the recipe of the model's family.

    Attributes:
        alpha: t outside the window, in (0, 1]; unset: what is published for the model and the nearest extension ratio,
            else 0.9. Smaller keeps more detail, and below 0.9 less consistency. 1 without bands leaves all as it is.
        beta: t in the bands around multiples of ``period`` instead, at most alpha; unset: published, else 0.6.
        period: frames after which the model's attention repeats; only for models that repeat themselves in long clips.
        gamma: half the width of a band, in frames.
        trained_frames: latent frames, as the transformer's tokens count them, of the clips that the model was trained
            on; unset: the released model's.
        first_frame: let the tokens of the first frame see only the first ``trained_frames`` frames, besides text, and
            all of these exactly, whatever a sparse method drops; for models that code the first frame by itself.
        center_keys: subtract the mean key from all keys first, so that a positive logit is one above its row's mean.
            The released kernels do; without decay it changes nothing.
    """

    name: ClassVar[str] = "ultravico"
    defaults: ClassVar[Mapping[str, Any]] = {"first_frame": False, "period": None, "gamma": None}

    alpha: Strength | None = None
    beta: Strength | None = None
    period: Annotated[float, gt(1), "`dit-accel tune period` finds the model's"] | None = None
    gamma: Annotated[float, ge(0), "HunyuanVideo's is 4"] | None = None
    trained_frames: Annotated[int, ge(1), "Wan 2.1's is 21"] | None = None
    first_frame: bool | None = None
    center_keys: bool = True

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        if self.alpha is not None and self.beta is not None:
            _check_order(self.alpha, self.beta)


def _check_order(alpha: float, beta: float) -> None:
    if beta > alpha:
        raise ConfigError(
            f"ultravico.beta must be at most alpha, since bands are what must decay more, got beta = {beta} and alpha "
            f"= {alpha}; 0.6 and 0.9 are usual"
        )


def mean_key(call: Call) -> Tensor:
    """Return the mean of a call's valid keys, summed in float32 (float64 for float64), [B, H, 1, D]."""
    mask, wide = call.key_mask(), torch.promote_types(call.k.dtype, torch.float32)
    if mask is None:
        return call.k.mean(2, keepdim=True, dtype=wide)
    valid = mask[:, None, :, None]
    total = call.k.masked_fill(~valid, 0).sum(2, keepdim=True, dtype=wide)
    return total / valid.sum(2, keepdim=True).clamp(min=1)


@lru_cache(maxsize=16)
def frame_decay(rule: DecayRule, layout: TokenLayout, device: str) -> FrameDecay:
    """Return a rule as the kernels take it; tokens that are not visual have no frame."""
    visual = torch.arange(layout.frames, dtype=torch.int32).repeat_interleave(layout.tokens_per_frame)
    frames = torch.nn.functional.pad(visual, (layout.text_before, layout.text_after), value=-1)
    with torch.inference_mode(False):  # made in inference mode it could not serve a training run later
        frames = frames.clone().to(device)
        return FrameDecay(
            table=torch.from_numpy(rule.table(layout.frames)).to(device), q_frames=frames, k_frames=frames
        )


@lru_cache(maxsize=16)
def first_frame_override(trained_frames: int, layout: TokenLayout, device: str) -> RowOverride:
    """Return the first frame's rows, and as their keys all but the visual tokens of frames after the trained length."""
    size, start = layout.tokens_per_frame, layout.text_before
    with torch.inference_mode(False):
        keys = torch.ones(layout.tokens, dtype=torch.bool, device=device)
        keys[start + trained_frames * size : start + layout.visual_tokens] = False
        return RowOverride(rows=torch.arange(start, start + size, device=device), keys=keys)


class UltraViCoHandler(AttentionHandler):
    """UltraViCo on one model: its decay put into the plan of clips that are long enough."""

    config_type = UltraViCo
    phase = Phase.TRANSFORMS
    by_place = True
    exclusive = frozenset({"frame decay", "rule for single rows"})
    extends = frozenset({"frames"})
    settings: UltraViCo

    def __init__(self, config: UltraViCo, model: Model) -> None:
        super().__init__(replace(config, trained_frames=model.trained_frames(config)), model)
        self._by_ratio: ByRatio = super().recipe(config, model).get("by_ratio", BY_RATIO)
        self._require_bands()

    @classmethod
    def recipe(cls, config: UltraViCo, model: Model) -> Mapping[str, Any]:
        """Return the values of unset options on a model; ``by_ratio`` is no option."""
        return {option: value for option, value in super().recipe(config, model).items() if option != "by_ratio"}

    def _require_bands(self) -> None:
        """Raise `ConfigError` if bands are described in part."""
        settings = self.settings
        period, gamma = settings.period, settings.gamma
        if period is None and (gamma is not None or settings.beta is not None):
            name, value = ("gamma", gamma) if gamma is not None else ("beta", settings.beta)
            raise ConfigError(
                f"ultravico.{name} = {value} describes bands around multiples of a period, which is "
                "neither set nor known for this model; set ultravico.period too, or leave it out"
            )
        if period is not None and gamma is None:
            raise ConfigError(
                f"ultravico.period = {period} needs the width of its bands; set ultravico.gamma, half of it, too"
            )

    def rule(self, frames: int) -> DecayRule:
        """Return the rule for a clip of so many token frames; alpha and beta, where unset, by the published table."""
        settings, trained = self.settings, self.settings.trained_frames or 1
        alpha, beta = strengths(self._by_ratio, frames / trained)
        alpha = alpha if settings.alpha is None else settings.alpha
        if settings.period is None:
            beta = None
        elif settings.beta is None:
            beta = min(alpha, SAFE_BETA if beta is None else beta)
        else:
            beta = settings.beta
            _check_order(alpha, beta)
        return DecayRule(trained_frames=trained, alpha=alpha, beta=beta, period=settings.period, gamma=settings.gamma)

    def check_layout(self, layout: TokenLayout) -> str:
        rule, family = self.rule(layout.frames), self.model.family
        trained, frames = rule.trained_frames, layout.frames
        output = f" ({output_frames(trained * family.patch[0], family.vae[0])} output frames)" if family else ""
        if frames <= trained:
            return f"ultravico changes nothing: {frames} latent frames, trained on {trained}{output}"
        bands = (
            "" if rule.beta is None else f", beta {rule.beta:g} within {rule.gamma:g} of multiples of {rule.period:g}"
        )
        return (
            f"ultravico: {frames} latent frames, {frames / trained:.2f} times the trained {trained}{output}; alpha "
            f"{rule.alpha:g} beyond {rule.window} frames{bands}; decay saves no work and is counted as none"
        )

    def applies(self, layout: TokenLayout) -> bool:
        """Whether the clip is longer than the trained ones, and anything would decay or be hidden."""
        rule = self.rule(layout.frames)
        return layout.frames > rule.trained_frames and bool(rule.decays or self.settings.first_frame)

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        """Add decay, the mean key, and the first frame's rows where they have a rule of their own."""
        settings, layout, device = self.settings, context.layout, str(context.device)
        rule = self.rule(layout.frames)
        if settings.center_keys:
            plan = plan.centre_keys(mean_key(call))
        if settings.first_frame:
            plan = plan.override_rows(first_frame_override(rule.trained_frames, layout, device))
        return plan.decay(frame_decay(rule, layout, device)) if rule.decays else plan

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        return Saving(notes=(self.check_layout(layout),))
