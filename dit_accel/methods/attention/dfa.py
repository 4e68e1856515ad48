"""DFA: between full steps only the foreground's queries attend; the background keeps its last attention output.

Source: the foreground-only attention of LightningCP's paper (arXiv 2509.00052), of which no code exists. Where we
depart from it: the foreground is what moves in the model's own prediction, found anew at every full step; queries see
all keys, which the paper's own rule (``strict``) does not let them.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from ...plan.call import Call
from ...plan.context import CallContext, Key
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan, KernelResult, ReusedRows
from ...report.sections import Section
from ...rules.foreground import motion, otsu, predicted
from ..base import AttentionHandler, Handler, Model, Phase, Place
from ..config import MethodConfig
from ..noise import FLOW, NeedsNoise
from ..options import Count, Steps, within
from ..prompt_branches import part_of
from ..saving import Saving, TileSaving
from ..site import ForwardContext, Site, target_sample
from ..steps import end_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class DFA(MethodConfig):
    """Attends from the foreground alone between full steps (foreground-only attention, arXiv 2509.00052).

    Each row of a batch has a foreground of its own; a prompt and its negative prompt share one, in one call or in two.
    Without any foreground it is Pyramid Attention Broadcast (arXiv 2408.12588) on self-attention: outputs are repeated.
    Text attends at every step. A layer's last output is held for every branch. LightningCP's other parts are not here:
    kept features in place of most layers, steps predicted in parallel from estimated latents, and layers that drop a
    reference image's features.

    Attributes:
        every: every n-th computed step is full; 1: all are, which changes nothing.
        share: share of the visual tokens that are foreground, those that move most; unset: Otsu's threshold splits
            them, clip by clip.
        strict: the foreground sees the foreground and text alone.
        warmup_steps: first steps that are full; below 1 a share of the run's steps, rounded up.
        last_steps: last steps that are full, likewise.
    """

    name: ClassVar[str] = "dfa"

    every: Count = 2
    share: Annotated[float, within(0, 1), "leave it unset for Otsu's threshold"] | None = None
    strict: bool = False
    warmup_steps: Steps = 0.2
    last_steps: Steps = 1

    def noise_needed(self) -> NeedsNoise | None:
        """Return that the foreground is read off a flow, where it is measured at all."""
        if self.every == 1 or self.share in (0, 1):
            return None
        instead = "use a flow-matching scheduler, or a method on whole steps such as EasyCache"
        asks = "dfa, which reads the foreground off a flow model's prediction,"
        return NeedsNoise(asks=asks, instead=instead, kinds=FLOW)

    def at_an_end(self, index: int, count: int | None) -> bool:
        """Tell whether a step is one of a run's first or last ones, which are full; errors as of `end_steps`."""
        first, last = end_steps(self, "warmup_steps", "last_steps", count)
        return index < first or (count is not None and index >= count - last)

    def is_full(self, index: int, count: int | None, since: int) -> bool:
        """Tell whether a step is full by the schedule alone, ``since`` computed steps after the last full one."""
        return self.at_an_end(index, count) or since >= self.every - 1

    def reusing(self, count: int) -> frozenset[int]:
        """Return the steps of a run of ``count`` that are not full, where every step is computed."""
        steps, since = set(), self.every
        for index in range(count):
            full = self.is_full(index, count, since)
            since = 0 if full else since + 1
            steps |= set() if full else {index}
        return frozenset(steps)


class DFAHandler(AttentionHandler):
    """DFA on one model: it measures what moves around forwards, and plans which rows attend."""

    config_type = DFA
    phase = Phase.CACHES  # plans last: it leaves rows out of what the others planned
    places = frozenset({Place.ATTENTION, Place.FORWARD})
    exclusive = frozenset({"reused rows"})
    settings: DFA

    def __init__(self, config: DFA, model: Model) -> None:
        super().__init__(config, model)
        self._outputs: dict[Key, Tensor] = {}
        self._masks: dict[str, tuple[TokenLayout, Tensor]] = {}  # transformer -> grid and what moves, [N, F, Y, X]
        self._rows: dict[tuple[str, TokenLayout], tuple[list[Tensor], Tensor]] = {}  # computed, as numbers, as bool
        self._step = (-1, "")  # the step that is settled, and the branch that leads it
        self._transformer = ""
        self._reuse = False
        self._since = 0
        self._shares: list[dict[str, Any]] = []

    def check_with(self, others: Sequence[Handler]) -> None:
        """Refuse methods that learn from all rows, or correct them."""
        for other in others:
            if getattr(other, "votes", False) or other.phase is Phase.CORRECTIONS:
                raise ConfigError(
                    f"dfa leaves rows of attention calls out, and {other.name} takes all of them; attach one of the two"
                )

    def check_layout(self, layout: TokenLayout) -> str | None:
        """Refuse an image, in which nothing moves."""
        if layout.frames == 1 and self.settings.every > 1 and self.settings.share not in (0, 1):
            raise ConfigError(
                "dfa tells the foreground by what moves, and an image does not; attach it to a video model"
            )
        return None

    def install(self, site: Site) -> None:
        site.around_forward(lambda context, run: self._around(site, context, run))

    def _around(self, site: Site, context: ForwardContext, run: Callable[..., Any]) -> Any:
        if context.training:
            self._reuse = False
            return run()
        leads = self._settle(context)
        output = run()
        if leads and not self._reuse and self._held_from(context):
            self._measure(site, context, target_sample(output))
        return output

    def _settle(self, context: ForwardContext) -> bool:
        """Decide whether a step is full, at its first branch; return whether this is that one."""
        if context.transformer != self._transformer:
            self.reset()  # what another expert gave says nothing of this one
            self._transformer = context.transformer
        if self._step[0] == context.step_index:
            return self._step[1] == context.branch
        index = context.step_index
        full = self.settings.is_full(index, context.num_inference_steps, self._since)
        full = full or context.transformer not in self._masks
        self._reuse, self._since = not full, 0 if full else self._since + 1
        self._step = index, context.branch
        return True

    def _held_from(self, context: Any) -> bool:
        """Tell whether a full step's outputs may be reused in the next."""
        after = context.step_index + 1
        return self.settings.every > 1 and not self.settings.at_an_end(after, context.num_inference_steps)

    def _measure(self, site: Site, context: ForwardContext, v: Tensor) -> None:
        """Find the foreground of a step, prompt by prompt."""
        layout, share, latents = context.layout, self.settings.share, context.inputs[site.adapter.latents]
        if layout is None:
            return
        if share in (0, 1):
            grid = layout.frames, layout.height, layout.width
            mask = torch.full((1, *grid), bool(share), device=v.device)
        else:
            moved = self._moved(context, target_sample(latents), v, layout)
            pairs = 2 if len(moved) % 2 == 0 and _holds_both(site, context, latents) else 1
            moved = moved.unflatten(0, (pairs, -1)).mean(0)
            edges = [otsu(row) if share is None else row.flatten().quantile(1 - share) for row in moved]
            mask = moved > torch.stack(edges)[:, None, None, None]
        self._masks[site.name] = layout, mask
        self._rows.clear()
        shares = mask.float().mean((1, 2, 3))
        self._shares.append({"step_index": context.step_index, "transformer": site.name, "foreground": shares})

    def _moved(self, context: ForwardContext, x: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        grid = layout.frames, layout.height, layout.width
        needs = self.settings.noise_needed()
        if needs is not None and (context.sigma is None or context.noise != "flow"):
            raise needs.untold(noise="none" if context.sigma is None else context.noise)
        toward_noise = -1 if self.model.adapter.toward_clean else 1
        clean = predicted(x, toward_noise * v, context.sigma or 0.0, grid, layout.text_before, layout.text_after)
        if clean is None:
            raise ConfigError(
                f"dfa can't lay what {context.transformer} predicts, {list(v.shape)} of {list(x.shape)}, on its "
                f"{grid[0]} x {grid[1]} x {grid[2]} tokens; use a method on whole steps such as EasyCache"
            )
        return motion(clean)

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        """Let only the foreground's rows and text be computed, in steps that are not full."""
        held = self._outputs.get(context.key)
        if not self._reuse or held is None or context.differentiate or context.transformer not in self._masks:
            return plan
        if held.shape != call.q.shape[:3] + held.shape[3:] or held.dtype != call.q.dtype:
            return plan
        parts = self._rows_of(context)
        if parts is None:
            return plan
        rows, seen = parts
        if all(len(numbers) == call.tokens for numbers in rows):
            return plan
        keys = torch.stack(seen) if self.settings.strict else None
        return plan.reuse_rows(ReusedRows(rows=tuple(rows), out=held, keys=keys))

    def _rows_of(self, context: CallContext) -> tuple[list[Tensor], list[Tensor]] | None:
        """Return the rows that are computed for each prompt in a call, as numbers [G] and as bool [S].

        None where its grid is another than the one measured.
        """
        key = context.transformer, context.layout
        if key not in self._rows:
            known, mask = self._masks[context.transformer]
            layout = context.layout
            if (known.frames, known.height, known.width) != (layout.frames, layout.height, layout.width):
                return None
            seen = torch.ones(len(mask), layout.tokens, dtype=torch.bool, device=mask.device)
            seen[:, layout.visual] = mask.flatten(1)
            self._rows[key] = [row.nonzero()[:, 0] for row in seen], seen
        rows, seen = self._rows[key]
        first = context.row * context.batch  # models that attend row by row hold one prompt of several in a call
        prompts = [(first + row) % len(rows) for row in range(min(context.batch, len(rows)))]
        return [rows[prompt] for prompt in prompts], [seen[prompt] for prompt in prompts]

    def after(self, plan: AttentionPlan, call: Call, context: CallContext, result: KernelResult) -> KernelResult:
        """Hold what a full step's call gave."""
        if not (self._reuse or context.differentiate or context.training) and self._held_from(context):
            self._outputs[context.key] = result.out.detach().clone()
            self.note_held(sum(output.nbytes for output in self._outputs.values()))
        return result

    def reset(self) -> None:
        self._outputs.clear()
        self._masks.clear()
        self._rows.clear()
        self._transformer, self._step, self._reuse, self._since = "", (-1, ""), False, 0

    def begin_run(self) -> None:
        self._shares.clear()

    def report(self) -> Section | None:
        if not self._shares:
            return None
        shares = [{**entry, "foreground": entry["foreground"].tolist()} for entry in self._shares]
        values = [value for entry in shares for value in entry["foreground"]]
        title = (
            f"dfa: foreground {min(values):.3f} to {max(values):.3f} of the visual tokens, at {len(shares)} full steps"
        )
        return Section(method="dfa", title=title, data={"foreground": shares})

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        settings, family = self.settings, self.model.family
        reusing = settings.reusing(steps)
        if not reusing or settings.share == 1:
            return Saving()
        held = family.heads * family.head_dim * family.layers * family.forwards_per_step if family else 0
        carried = 2 * layout.tokens * held
        if settings.share is None:
            note = "what moves is known only while dfa runs; without dfa.share no row that it leaves out is counted"
            return Saving(counted=False, carried_bytes=carried, notes=(note,))
        left = settings.share**2 if settings.strict else settings.share
        rows = TileSaving(tiles=None, active=lambda step, layer: step in reusing, keep=lambda share, rows: share * left)
        note = (
            f"dfa is counted with {settings.share:g} of the visual rows in {len(reusing)} of {steps} steps; beside "
            "tile lists more rows are computed, since a tile is computed whole"
        )
        return Saving(tiles=rows, carried_bytes=carried, notes=(note,))


def _holds_both(site: Site, context: ForwardContext, latents: Any) -> bool:
    """Tell whether a forward holds a row of each prompt and one of its negative prompt, half after half.

    Where nothing says it, every row stands alone.
    """
    with contextlib.suppress(ConfigError):
        return part_of(DFA.name, site, context, latents) == "both"
    return False
