"""NAG: attention guided away from what a negative text gives, within the one conditional forward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

from torch import Tensor

from ...adapters.cross_attention import CrossAttention
from ...adapters.joined_text import JoinedText
from ...errors import ConfigError, MissingOption
from ...plan.call import Call
from ...plan.context import CallContext, StepContext
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan
from ...report.sections import Section
from ..base import AttentionHandler, Model, Place
from ..config import MethodConfig
from ..options import NO_FILE, ge, within
from ..prompt_branches import NAMES, part_of, rows_of_prompt
from ..saving import Saving
from ..site import ForwardContext, Site
from .guidance_config import WindowedConfig
from .log import WindowedHandler, strips_of
from .nag_cross import CrossAttentionNAG
from .nag_joined import JointNAG
from .negative_text import encoded
from .targets import LAST_CHANGE


@dataclass(frozen=True, slots=True, kw_only=True)
class NAG(WindowedConfig):
    """Leads attention away from what a negative text gives, also at guidance 1.

    Z+ is the output of an attention, before its output projection, with the prompt and Z- with the negative text.
    G = s Z+ - (s - 1) Z- is cut down to at most tau times Z+'s length in L1, token by token; Z+ becomes
    alpha G + (1 - alpha) Z+. Cross-attention runs on both texts, without a forward of its own. Where text joins the
    self-attention, the negative text is a further batch row, which costs one extra forward of each conditional row.

    Source: NAG (arXiv 2505.21179). Where we depart from it: in image-to-video models, whose cross-attention adds what
    it takes from pictures, that part is in Z+ and Z- alike, and in their lengths; in joined attention both texts are
    modulated by the prompt's pooled embedding, as its code for SD3 does, on FLUX.1 too.

    Attributes:
        scale: s >= 1; 1 changes nothing.
        tau: longest G, in lengths of Z+, >= 1.
        alpha: weight of G, in [0, 1]; 0 changes nothing.
        negative_prompt: the text; the pipeline's own encoder encodes it when the method is attached.
        negative_embeds: in place of it, what that encoder gives, [1, tokens, C], unpadded where the model masks padded
            text. Two configs are compared without it, and it is in no TOML table.
    """

    name: ClassVar[str] = "nag"
    defaults: ClassVar[Mapping[str, Any]] = {"scale": 5.0, "tau": 2.5, "alpha": 0.25, "start": 0.0, "stop": 1.0}

    scale: Annotated[float, ge(1), "1 changes nothing"] | None = None
    tau: Annotated[float, ge(1), "below 1 all tokens would shrink"] | None = None
    alpha: Annotated[float, within(0, 1), "0 changes nothing"] | None = None
    negative_prompt: Annotated[str, NO_FILE] | None = None
    negative_embeds: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        WindowedConfig.__post_init__(self)
        if self.negative_embeds is None:
            return
        if self.negative_prompt is not None:
            raise ConfigError("nag takes negative_prompt or negative_embeds, and got both; give one of them")
        shape = tuple(self.negative_embeds.shape)
        if len(shape) != 3 or shape[0] != 1 or 0 in shape:
            raise ConfigError(f"nag.negative_embeds must be [1, tokens, C], got {list(shape)}; give one text's")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, as plain values; embeddings are none."""
        values = MethodConfig.to_dict(self)
        values.pop("negative_embeds", None)
        return values


class NAGHandler(WindowedHandler, AttentionHandler):
    """NAG on one model."""

    config_type = NAG
    did = "guided"
    places = frozenset({Place.FORWARD, Place.TEXT})
    exclusive = LAST_CHANGE
    by_place = True
    settings: NAG

    def __init__(self, config: NAG, model: Model) -> None:
        super().__init__(config, model)
        self._embeds: Tensor | None = self.settings.negative_embeds
        self._texts: dict[str, CrossAttentionNAG | JointNAG] = {}

    @property
    def neutral(self) -> bool:
        return self.settings.scale == 1 or self.settings.alpha == 0

    @property
    def _joined(self) -> JoinedText | None:
        """Where the model's text joins the self-attention; None: it comes in by cross-attention."""
        where = self.model.adapter.joined_text
        crossed = isinstance(self.model.adapter.cross_attention, CrossAttention)
        return where if isinstance(where, JoinedText) and not crossed else None

    def require_given(self) -> None:
        if self._embeds is None and self.settings.negative_prompt is None:
            raise MissingOption(
                "nag leads away from a text, and none is set; set nag.negative_prompt, such as 'blurry, low quality', "
                "or nag.negative_embeds",
                needs="negative_prompt or negative_embeds",
            )

    def install(self, site: Site) -> None:
        """Run around every forward and what attends to the text; raise `ConfigError` without a negative text."""
        where = self._joined or site.adapter.cross_attention
        assert not isinstance(where, (str, type(None)))
        prompt = self.settings.negative_prompt
        if self._embeds is None:
            self.require_given()
            assert prompt is not None
            padded = isinstance(where, JoinedText) and where.mask is None
            self._embeds = encoded(site, prompt, padded=padded)
        if isinstance(where, JoinedText):
            again = None if prompt is None else lambda tokens: encoded(site, prompt, padded=True, tokens=tokens)
            text = JointNAG(site, where, self._embeds, self.settings, again)
        else:
            text = CrossAttentionNAG(site, where, self._embeds, self.settings)
        self._texts[site.name] = text
        site.around_forward(lambda context, run: self._around(site, text, context, run))

    def is_active(self, step: StepContext, depth: int) -> bool:
        text = self._texts.get(step.transformer)
        return isinstance(text, JointNAG) and text.on

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        text = self._texts[context.transformer]
        assert isinstance(text, JointNAG)
        return text.plan(plan, context)

    def _around(
        self, site: Site, text: CrossAttentionNAG | JointNAG, context: ForwardContext, run: Callable[..., Any]
    ) -> Any:
        latents = context.inputs[site.adapter.latents]
        if not self.acts(context, latents):
            return run()
        outer = context if context.beside is None else replace(context, branch=context.beside)
        # a perturbed branch runs beside the conditional one, and has its rows alone where it says which it has
        named = ("/" in outer.branch and outer.branch.split("/")[-1] not in NAMES) or context.rows is not None
        part = "cond" if named else part_of(self.name, site, outer, latents)
        if part == "uncond":
            return run()
        calls = text.calls
        out = text.guided(context, rows_of_prompt(site, part, len(latents), "cond"), run)
        if text.calls > calls:  # else a cache skipped it
            self._log.append((context.transformer, context.step_index, context.branch))
        return out

    def begin_run(self) -> None:
        super().begin_run()
        for text in self._texts.values():
            text.calls = 0

    def report(self) -> Section | None:
        self.warn_of_nothing()
        if not self._seen:
            return None
        steps, calls = sorted({step for _, step, _ in self._log}), sum(text.calls for text in self._texts.values())
        settings, kind = self.settings, next(iter(self._texts.values())).kind
        title = (
            f"nag: scale {settings.scale:g}, tau {settings.tau:g}, alpha {settings.alpha:g}; {len(self._log)} forwards "
            f"guided in {len(steps)} steps, {calls} calls of {kind}"
        )
        lines = [line for line in (self.nothing_done(), settings.too_short(self._steps)) if line]
        data = {
            "steps": steps,
            "branches": sorted({branch for _, _, branch in self._log}),
            "forwards": len(self._log),
            "calls": calls,
        }
        strips = strips_of("guided", [(*entry, None) for entry in self._log])
        return Section(method=self.name, title=title, lines=tuple(lines), data=data, strips=strips)

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        """Return the cost: in words where that is cross-attention, which is no part of what is counted."""
        notices = (short,) if (short := self.settings.too_short(steps)) else ()
        if self.neutral:
            return Saving(warnings=notices)
        acts = len(self.settings.steps(steps))
        if self._joined is not None:
            note = f"nag runs the conditional forward for two texts in {acts} steps, as dear as a forward more in each"
            return Saving(extra_forwards=float(acts), notes=(note,), warnings=notices)
        note = f"nag computes the cross-attention of the conditional forward twice in {acts} steps; no forward is added"
        return Saving(notes=(note,), warnings=notices)
