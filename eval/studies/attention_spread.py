"""Measures how far attention spreads beyond the trained size: `python eval/studies/attention_spread.py`.

In runs of the embedded models at their trained size and beyond, as they are and with the methods for larger pictures
and longer clips: the entropy of the visual tokens' attention to each other, and its share that stays near the row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.runs.results import Line, markdown_table
from study import study
from torch import Tensor

import dit_accel
from dit_accel.methods.base import AttentionHandler, Model, Phase
from dit_accel.methods.config import MethodConfig
from dit_accel.plan.call import Call
from dit_accel.plan.context import CallContext
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan

STEPS = 8
MEASURED = (0, 1, STEPS // 2)
"""Steps that are measured: UltraImage's factors act from the second on."""

MEANS_FROM = 1
"""The first of the steps over which a line's own figures are means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model beyond its trained size.

    Attributes:
        sizes: times the trained size -> arguments of the pipeline's call; the first is the trained size.
        near: tokens (of a picture, along either side) or latent frames (of a clip) that are near: half of the trained.
        arms: name -> what is attached beyond the trained size.
    """

    sizes: Mapping[float, Mapping[str, int]]
    near: int
    arms: Mapping[str, tuple[MethodConfig, ...]]


CASES = {
    "flux-tiny": Case(
        sizes={ratio: {"height": int(96 * ratio), "width": int(96 * ratio)} for ratio in (1.0, 1.5, 2.0, 3.0)},
        near=6,
        arms={
            "ultraimage, heads alone": (dit_accel.UltraImage(correct=False),),
            "ultraimage": (dit_accel.UltraImage(),),
        },
    ),
    "wan-tiny": Case(
        sizes={1.0: {"num_frames": 17}, 2.0: {"num_frames": 33}, 3.0: {"num_frames": 49}, 4.0: {"num_frames": 65}},
        near=4,
        arms={"ultravico": (dit_accel.UltraViCo(alpha=0.9),)},
    ),
}
PLAIN = "as it is"


class Spread(MethodConfig):
    """Asks for `Watcher`."""

    name = "spread"


class Watcher(AttentionHandler):
    """Measures what `figures` tells of every call of the prompt's own branch, and changes nothing.

    Attributes:
        found: step -> the figures of its calls.
        tokens: how many visual tokens there are.
    """

    config_type = Spread
    phase = Phase.CORRECTIONS

    def __init__(self, model: Model, near: int, rows: int) -> None:
        super().__init__(Spread(), model)
        self.near, self.rows, self.tokens = near, rows, 0
        self.found: dict[int, list[tuple[float, ...]]] = {}

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        """Measure a call under what the methods before this one said of it."""
        if context.branch != "uncond" and context.step_index in MEASURED:
            measured = figures(plan, call, context.layout, self.near, self.rows)
            self.found.setdefault(context.step_index, []).append(measured)
            self.tokens = context.layout.visual_tokens
        return plan


@torch.no_grad()
def figures(plan: AttentionPlan, call: Call, layout: TokenLayout, near: int, rows: int) -> tuple[float, float, float]:
    """Return of a call: entropy in nats, the share of the attention near its row, and that of uniform attention.

    Means over heads and rows. Attention is that of visual tokens to visual tokens, so that a row's shares sum to 1.

    Args:
        plan: whose factors of heads, decay and rows with a rule of their own hold; its tiles do not.
        call: with keys as the plan centres them.
        layout: where the visual tokens lie.
        near: the largest distance, in tokens of a picture along either side, or in frames of a clip.
        rows: how many visual tokens are looked at, drawn without replacement, the same in every call of a layout.
    """
    chosen, distance = _rows(layout, rows)
    q, k = (x[:, :, layout.visual].float() for x in (call.q, call.k))
    logits = q[:, :, chosen] @ k.mT * (q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if plan.head_scale is not None:
        logits = logits * plan.head_scale.reshape(-1, q.shape[1], 1, 1)
    if plan.frame_decay is not None:
        logits = torch.minimum(logits, plan.frame_decay.table[distance] * logits)
    if plan.row_override is not None:
        overridden = torch.isin(chosen + layout.text_before, plan.row_override.rows)
        logits = logits.masked_fill(overridden[:, None] & ~plan.row_override.keys[layout.visual], -torch.inf)
    attention, within = logits.softmax(-1), distance <= near
    entropy = -torch.special.xlogy(attention, attention).sum(-1)
    return float(entropy.mean()), float((attention * within).sum(-1).mean()), float(within.float().mean())


@lru_cache(maxsize=16)
def _rows(layout: TokenLayout, count: int) -> tuple[Tensor, Tensor]:
    """Return the rows, int64 [R], and the distance of every visual token from them, int64 [R, n].

    Of a clip it is that of frames; of a picture that along the side on which they are further apart.
    """
    drawn = torch.randperm(layout.visual_tokens, generator=torch.Generator().manual_seed(0))[:count]
    token = torch.arange(layout.visual_tokens)
    frame, place = token // layout.tokens_per_frame, token % layout.tokens_per_frame
    axes = [frame] if layout.frames > 1 else [place // layout.width, place % layout.width]
    return drawn, torch.stack([(axis[drawn, None] - axis).abs() for axis in axes]).amax(0)


def measure(name: str, case: Case, prompts: int, rows: int) -> Iterator[Line]:
    """Give a line for each size and arm of an embedded model; at the trained size only as it is.

    Args:
        name: of the model.
        case: its sizes and arms.
        prompts: held-out ones, with their numbers as seeds.
        rows: of each call.
    """
    model = EmbeddedModel(name, {})
    for ratio, call in case.sizes.items():
        for arm, methods in {PLAIN: (), **(case.arms if ratio > 1 else {})}.items():
            runs = [_run(model, case.near, prompt, call, methods, rows) for prompt in range(prompts)]
            by_step = np.mean([[np.mean(run.found[step], 0) for step in MEASURED] for run in runs], 0)
            entropy, mass, uniform = by_step[MEANS_FROM:].mean(0).tolist()
            yield {
                "model": name, "weights": model.weights, "size": ratio, "call": dict(call), "arm": arm,
                "prompts": prompts, "rows": rows, "steps": STEPS, "tokens": runs[0].tokens,
                "most_entropy": float(np.log(runs[0].tokens)), "entropy": entropy, "near": case.near, "mass": mass,
                "uniform_mass": uniform, "measured_steps": list(MEASURED),
                "entropy_by_step": by_step[:, 0].tolist(), "mass_by_step": by_step[:, 1].tolist(),
                "torch": torch.__version__,
            }  # fmt: skip


def _run(
    model: EmbeddedModel, near: int, prompt: int, call: Mapping[str, Any], methods: Sequence[MethodConfig], rows: int
) -> Watcher:
    """Return what was watched in one generation with methods attached."""
    with dit_accel.attach(model.pipe, *methods, preset="none") as attachment:
        execution = attachment.engine
        watcher = Watcher(Model(adapter=model.adapter, family=model.family, heads=0, layers=0), near, rows)
        execution.use((*execution.handlers, watcher))
        model.run(prompt, steps=STEPS, solver="unipc", call=call)
    return watcher


def table(lines: Sequence[Line]) -> str:
    """Return the lines as a Markdown table under a sentence on how they were measured."""
    first = lines[0]
    head = (
        f"{first['prompts']} held-out prompts, {first['steps']} UniPC steps, the second and the middle one of them; "
        f"{first['rows']} rows of every head and layer, torch {first['torch']}."
    )
    heads = "model | times the trained size | arm | tokens | their logarithm | entropy, nats | near | mass near"
    rows = [
        (
            line["model"], f"{line['size']:g}", line["arm"], line["tokens"], f"{line['most_entropy']:.2f}",
            f"{line['entropy']:.2f}", line["near"], f"{line['mass']:.3f}", f"{line['uniform_mass']:.3f}",
        )
        for line in lines
    ]  # fmt: skip
    return f"{head}\n\n{markdown_table(f'{heads} | if uniform', rows)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write one JSON line for each model, size and arm, and print the table; returns the exit code."""
    return study(__doc__, arguments, measure_all, table, out="attention-spread.jsonl", prompts=4, rows=64)


def measure_all(options: Any, lines: list[Line]) -> Iterator[Line]:
    """Give the lines of all models."""
    for name, case in CASES.items():
        yield from measure(name, case, options.prompts, options.rows)


if __name__ == "__main__":
    raise SystemExit(main())
