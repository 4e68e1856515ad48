"""UltraImage: pictures larger than the model was trained on, by corrected positions and more concentrated heads.

Source: UltraImage (arXiv 2512.04504). Where we depart from it: heads are measured inside the run's first step, which
stays as it is, not in two steps before it; by the entropy over tokens of some rows, not over tiles of 128 x 128 (whose
constants do not carry over), between the extremes that are measured; what is kept is one number a head. The factor goes
onto the queries, so that attention stays the one that the user set in diffusers. Which frequencies are corrected is
found by `dit_accel.rules.rotary_frequencies`, or published for the model. Guided mode (a small picture leads a large
one) and view mode (a small picture inside a large one): `.guide`. The paper's queries in chunks of 65,536 rows are not
here: no kernel of scaled_dot_product_attention but the plain "math" one holds the attention matrix, and measuring holds
the logits of ``rows`` x 2,048 keys at a time (`.entropy`), 2 MiB in float32 for each head and batch row, a few times
over.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from ...errors import ConfigError, MissingOption
from ...plan.call import Call
from ...plan.context import CallContext, StepContext
from ...plan.heads import HeadShare
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan
from ...report.sections import Section
from ...rules.rotary_frequencies import edited
from ..base import AttentionHandler, Handler, Model, Phase, Place
from ..config import MethodConfig
from ..noise import FLOW, NeedsNoise
from ..options import Count, Share, ge, gt, within
from ..saving import Saving
from ..site import ForwardContext, Site
from .entropy import focus, token_entropy
from .guide import Guide
from .rope import check_frequencies
from .rope_switcher import RopeSwitcher, require_kind, trained_lengths

AXES = ("height", "width")

Calls = tuple[str, str, int, int]
"""(transformer, branch, row, batch): the calls whose heads are compared with each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UltraImage(MethodConfig):
    """Pictures larger than trained: corrected positions, and heads that concentrate by their entropy (2512.04504).

    The frequency along height and along width that would repeat the picture is slowed down, and the logits of each head
    are multiplied by a factor that is the larger, the more local the head is in the first step. A picture that is no
    larger than trained is left as it is. An option left unset takes the recipe of the model's family.

    ``guided`` and ``view`` make a small picture first, and `Attachment.call` calls the pipeline twice then:
    ``attachment.call(prompt, height=3584, width=3584)`` instead of ``pipe(...)``; `dit-accel generate` does so too.

    Two settings of the pipeline belong to it, which `dit-accel generate` makes for FLUX.1 [dev] and Qwen-Image, and
    which are yours to make in Python, with N the picture's token rows x columns:

    - ``pipe.vae.enable_tiling()``, so that decoding takes no more memory for a larger picture;
    - ``pipe.scheduler.register_to_config(max_image_seq_len=N)`` where N is above the scheduler's own, which pins the
      noise shift (mu) at its largest: it grows with N and would collapse the schedule.

    Attributes:
        correct: correct the positions; without, heads alone are changed, on models without rotary positions too.
        focus_min: factor of the head of the highest entropy, at least 1; unset: published, else 1.
        focus_max: factor of the head of the lowest; unset: published, else 1.3. 1.6 is too sharp on Qwen-Image.
        power: exponent between them; smaller concentrates more heads. Unset: 2.
        rows: query rows of the picture that are measured in each call.
        indices: the frequencies that are corrected, 0 the fastest; unset: published, else found by their periods.
        turn: turns that a corrected frequency makes over the wanted length, in (0, 1]; unset: published, else 1, as
            the paper's formula has it, for Qwen-Image too, whose released code divides its two frequencies by how many
            times the picture is larger.
        trained_height: token rows of the largest pictures that the model was trained on; unset: the released model's.
        trained_width: the same of token columns.
        guided: a small picture is made first and enlarged, and the large one begins from it, noised to
            ``follow_above``; the steps before that cost nothing.
        view: a small picture is made first, and stands in the middle of the large one above ``follow_above``.
        follow_above: noise level from 0 to 1 above which the small picture is followed; 1: nowhere. Unset: 0.8.
        pull: of ``guided``: share by which the low frequencies are pulled to the small picture's below that, less and
            less with the noise; 0: not at all.
        small: tokens of the small picture's longer side; unset: it fits into the size that the model makes by default.
        enlarge: what of the small picture is enlarged, by bicubic interpolation: the ``picture``, which is encoded
            again, or its ``latents``, which takes no autoencoder. Unset: the picture.
    """

    name: ClassVar[str] = "ultraimage"
    # the paper's
    defaults: ClassVar[Mapping[str, Any]] = {
        "focus_min": 1.0, "focus_max": 1.3, "power": 2.0, "turn": None, "indices": None, "follow_above": 0.8,
        "enlarge": "picture",
    }  # fmt: skip

    correct: bool = True
    focus_min: Annotated[float, ge(1)] | None = None
    focus_max: Annotated[float, ge(1)] | None = None
    power: Annotated[float, gt(0)] | None = None
    rows: Count = 256
    indices: tuple[int, ...] | None = None
    turn: float | None = None
    trained_height: Count | None = None
    trained_width: Count | None = None
    guided: bool | None = None
    view: bool | None = None
    follow_above: Annotated[float, within(0, 1)] | None = None
    pull: Share | None = None
    small: Count | None = None
    enlarge: Literal["picture", "latents"] | None = None

    def noise_needed(self) -> NeedsNoise | None:
        """Return that the small picture is followed down to a noise level, where there is one."""
        asks = f"ultraimage.{'guided' if self.guided else 'view'}"
        return NeedsNoise(asks=asks, instead="leave it out", kinds=FLOW) if self.guided or self.view else None

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        check_frequencies(self, "ultraimage", turn=self.turn, indices=self.indices)
        if self.guided and self.view:
            raise ConfigError(
                "ultraimage.guided enlarges the small picture, and ultraimage.view leaves it its size in the middle, "
                "got both; set one of them"
            )
        if self.pull and not self.guided:
            raise ConfigError(
                f"ultraimage.pull = {self.pull:g} pulls to an enlarged small picture, and there is none; set "
                "ultraimage.guided = true, or leave it out"
            )
        if self.focus_min is not None and self.focus_max is not None:
            _check_order(self.focus_min, self.focus_max)


def _check_order(least: float, most: float) -> None:
    if least > most:
        raise ConfigError(
            f"ultraimage.focus_min must be at most focus_max, since local heads are what must concentrate more, got "
            f"focus_min = {least:g} and focus_max = {most:g}; 1 and 1.3 are usual"
        )


@dataclass(eq=False)
class _Heads:
    """The heads of the calls that are compared: measured in one step, made sharper from the next on."""

    step: int
    entropy: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    factors: dict[int, Tensor] = dataclasses.field(default_factory=dict)


class UltraImageHandler(AttentionHandler):
    """UltraImage on one model: positions through the site, factors of heads through the plan."""

    config_type = UltraImage
    phase = Phase.TRANSFORMS
    places = frozenset({Place.ATTENTION, Place.FORWARD})
    extends = frozenset(AXES)
    settings: UltraImage

    def __init__(self, config: UltraImage, model: Model) -> None:
        super().__init__(config, model)
        _check_order(self.settings.focus_min or 1, self.settings.focus_max or 1)
        options = {axis: getattr(config, f"trained_{axis}") for axis in AXES}
        known = trained_lengths(config.name, options, model.family)
        missing = [axis for axis in AXES if axis not in known]
        if missing:
            raise MissingOption(
                f"ultraimage needs the size of the pictures that the model was trained on; set ultraimage.trained_"
                f"{missing[0]} to its tokens",
                needs=f"trained_{missing[0]}",
            )
        if config.correct:
            try:
                require_kind(model, "ultraimage", AXES)
            except ConfigError as error:
                raise ConfigError(f"{error}; ultraimage.correct = false changes heads alone") from None
        self._trained = {axis: known[axis] for axis in AXES}
        self.guide = Guide(self.settings.follow_above or 0.0, self.settings.pull or 0.0)
        self._heads: dict[Calls, _Heads] = {}
        self._compared: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def check_with(self, others: Sequence[Handler]) -> None:
        """Refuse another method that changes the positions, unless this one leaves them."""
        for other in others:
            if self.settings.correct and "rotary frequencies" in other.exclusive:
                raise ConfigError(
                    f"ultraimage and {other.name} both change the rotary frequencies of a forward, which takes only "
                    "one; attach one of them, or set ultraimage.correct = false"
                )

    def install(self, site: Site) -> None:
        """Let the transformer's positions follow the size of each forward, if they are to be corrected."""
        if self.settings.correct:
            RopeSwitcher(site, AXES, self._trained, self._edit)
        if self.two_stages:
            site.around_forward(lambda context, run: self._around(site, context, run))

    @property
    def two_stages(self) -> bool:
        """Whether a small picture is made before a large one."""
        return bool(self.settings.guided or self.settings.view)

    def small_grid(self, height: int, width: int) -> tuple[int, int] | None:
        """Return the tokens of the small picture that comes before a larger one; None: none does."""
        if not self.two_stages or not self.applies(TokenLayout(frames=1, height=height, width=width)):
            return None
        family, grid = self.model.family, tuple(self._trained.values())
        if family is not None:
            token = family.vae[1] * family.patch[1], family.vae[1] * family.patch[2]
            grid = family.height // token[0], family.width // token[1]
        share = min(grid[0] / height, grid[1] / width)
        if self.settings.small is not None:
            share = self.settings.small / max(height, width)
        if share >= 1:
            raise ConfigError(
                f"ultraimage.small = {self.settings.small} tokens is no smaller than the picture of {height} x "
                f"{width}; take a smaller one, or leave it unset"
            )
        return max(1, round(height * share)), max(1, round(width * share))

    def _around(self, site: Site, context: ForwardContext, run: Callable[..., Any]) -> Any:
        """Let a forward of a larger picture follow the small one; raise `ConfigError` where none was made."""
        if self.guide.making or context.training or context.layout is None or not self.applies(context.layout):
            return run()
        if self.guide.picture is None:
            option = "guided" if self.settings.guided else "view"
            raise ConfigError(
                f"ultraimage.{option} makes a small picture before a large one, and this call makes the large one "
                "alone; call attachment.call(prompt, height=..., width=...) instead of the pipeline, or leave it out"
            )
        return self.guide.around(site, context, run)

    def _edit(self, freqs: Any, trained: float, length: float) -> Any:
        settings = self.settings
        return edited(
            "ultraimage", freqs, trained=trained, length=length, turn=settings.turn, indices=settings.indices
        )  # fmt: skip

    def check_layout(self, layout: TokenLayout) -> str | None:
        size = f"{layout.height} x {layout.width} tokens"
        trained = " x ".join(str(self._trained[axis]) for axis in AXES)
        if not self.applies(layout):
            return f"ultraimage changes nothing: {size}, trained on {trained}"
        what = "positions corrected, " if self.settings.correct else ""
        return (
            f"ultraimage: {size}, trained on {trained}; {what}heads concentrated by {self.settings.focus_min:g} to "
            f"{self.settings.focus_max:g} from the second step on"
        )

    def applies(self, layout: TokenLayout) -> bool:
        lengths = layout.lengths
        return any(lengths[axis] > self._trained[axis] for axis in AXES)

    def is_active(self, step: StepContext, depth: int) -> bool:
        """Active but in training, whose forwards have no step before them in which heads could be measured."""
        return not step.training

    def needs_step(self, step: StepContext) -> bool:
        """Whether this branch's heads are still to be measured, or the small picture is followed, which is free."""
        if step.layout is not None and not self.applies(step.layout):
            return False
        if self.guide.follows(step.sigma):
            return True
        known = [heads for key, heads in self._heads.items() if key[:2] == (step.transformer, step.branch)]
        return not known or any(heads.step == step.step_index for heads in known)

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        """Measure the heads in the branch's first step; from the next on put their factors into the plan."""
        key = context.transformer, context.branch, context.row, context.batch
        heads = self._heads.get(key)
        if heads is None:
            heads = self._heads[key] = _Heads(step=context.step_index)
        if heads.step == context.step_index:
            rows = _rows(context.layout, self.settings.rows, str(context.device))
            q = call.q.index_select(2, rows)
            heads.entropy[context.layer] = token_entropy(q, call.k, scale=call.scale, mask=call.key_mask())
            return plan
        if not heads.factors:
            self._compare(key, heads, context.heads)
        factors = heads.factors.get(context.layer)
        return plan if factors is None else plan.scale(factors)

    def _compare(self, key: Calls, heads: _Heads, share: HeadShare | None) -> None:
        """Set the factors of all heads, by their entropies against those of all layers, each batch row by itself."""
        entropy = torch.stack(list(heads.entropy.values()))
        entropy = entropy if share is None else share.joined(entropy, 2)
        lowest, highest = (f(entropy, dim=(0, 2), keepdim=True) for f in (torch.amin, torch.amax))
        settings = self.settings
        factors = focus(entropy, lowest, highest, settings.focus_min or 1, settings.focus_max or 1, settings.power or 1)
        shard = factors if share is None else factors[..., share.own]
        heads.factors = dict(zip(heads.entropy, shard.float(), strict=True))
        self._compared[key[:2]] = entropy, factors
        held = [x for entry in self._heads.values() for part in (entry.entropy, entry.factors) for x in part.values()]
        self.note_held(sum(x.nbytes for x in held))

    def reset(self) -> None:
        self._heads.clear()

    def begin_run(self) -> None:
        self._compared.clear()
        self.guide.followed.clear()
        self.guide.pulled.clear()

    def report(self) -> Section | None:
        lines, data = self._guide_lines(), {}
        if not self._compared and not lines:
            return None
        for (transformer, branch), (entropy, factors) in self._compared.items():
            low, high = float(entropy.min()), float(entropy.max())
            mean = float(factors.mean())
            lines.append(f"{transformer}, {branch}: entropy {low:.2f} to {high:.2f}, mean factor {mean:.3f}")
            data[f"{transformer} {branch}"] = {"entropy": [low, high], "mean_factor": mean}
        return Section(method=self.name, title="heads as measured in the first step", lines=tuple(lines), data=data)

    def _guide_lines(self) -> list[str]:
        """Return in how many steps a small picture led, and how."""
        followed, pulled = len(self.guide.followed), len(self.guide.pulled)
        if not followed and not pulled:
            return []
        how = "took no forward but the small picture" if self.settings.guided else "had the small picture in the middle"
        return [f"{followed} steps {how}", *([f"{pulled} were pulled to its low frequencies"] if pulled else [])]

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        """Return a saving of no work, with notes on what is done; two numbers a head and branch are held."""
        branches = self.model.family.forwards_per_step if self.model.family is not None else 1
        held = 8 * self.model.layers * self.model.heads * branches if self.applies(layout) and steps > 1 else 0
        notes = [f"{self.check_layout(layout)}; it saves no work"]
        if (small := self.small_grid(layout.height, layout.width)) is not None:
            saved = "; the steps that follow it take no forward, which is not counted" if self.settings.guided else ""
            notes.append(f"ultraimage: a picture of {small[0]} x {small[1]} tokens is made first{saved}")
        return Saving(notes=tuple(notes), carried_bytes=held)


@lru_cache(maxsize=16)
def _rows(layout: TokenLayout, count: int, device: str) -> Tensor:
    """Return the rows that are measured: visual tokens at even distances, int64 [at most ``count`` of them]."""
    visual = layout.visual_tokens
    places = torch.linspace(0, visual - 1, min(count, visual), dtype=torch.float64).round().long()
    with torch.inference_mode(False):  # made in inference mode it could not serve a training run later
        return (places + layout.text_before).to(device)
