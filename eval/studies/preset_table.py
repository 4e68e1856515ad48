"""What each preset level measured on the embedded models: the table of docs/presets.md, and the figures of the code."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from dit_accel_eval.runs.results import latest, markdown_table, read_lines
from dit_accel_eval.statistics import Estimate, estimate

from dit_accel.methods.presets import LEVELS, MEASURED_ON

RESULTS = "eval/results/presets-{}.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One level on one model.

    Attributes:
        psnr: in dB to the model's own dense run.
        time: processor time of the denoising loop on one thread, of the dense run's.
        skipped: share of the forwards.
    """

    psnr: Estimate
    time: float
    skipped: float


def figures(root: Path) -> dict[str, dict[str, Measured]]:
    """Return model -> level -> what its committed suite measured; a model that was not measured is left out."""
    found: dict[str, dict[str, Measured]] = {}
    for model in MEASURED_ON:
        lines = latest(read_lines(root / RESULTS.format(model)))
        dense = {clip: line for (arm, clip), line in lines.items() if arm == f"unipc {line['reference_steps']}"}
        for level in LEVELS:
            own = {clip: line for (arm, clip), line in lines.items() if arm == level and clip in dense}
            if not own:
                continue
            found.setdefault(model, {})[level] = Measured(
                psnr=estimate([line["psnr"] for line in own.values()]),
                time=statistics.fmean(
                    line["times"]["processor"] / dense[clip]["times"]["processor"] for clip, line in own.items()
                ),
                skipped=statistics.fmean(1 - line["forwards"] / dense[clip]["forwards"] for clip, line in own.items()),
            )
    return found


def table(root: Path) -> str:
    """Return the levels' Markdown table."""
    found = figures(root)
    if not found:
        return (
            "Not measured yet; `dit-accel eval run eval/suites/presets-wan-tiny.toml` and `presets-flux-tiny.toml` do."
        )
    heads = ["level", *(f"{model}: PSNR, dB (median) | times as fast" for model in found)]
    rows = [
        [
            f"`{level}`",
            *(cell for of in found.values() for cell in (of[level].psnr.cell(".1f"), f"{1 / of[level].time:.2f}")),
        ]
        for level in LEVELS
    ]
    return markdown_table(" | ".join(heads), rows)
