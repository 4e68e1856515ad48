"""What README.md and docs/quality.md say of the committed report, search and demo: `readme` puts it there."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_assets import model_defaults
from dit_accel_eval.runs.results import TIMED, WORKS, ResultLine, markdown_table, result_lines
from dit_accel_eval.statistics import TOO_FEW, Judged, clip_mean, judge, reach_words
from dit_accel_eval.suites.figures import NOTHING, Comparison, suite_figures
from dit_accel_eval.suites.suite import read_suite
from dit_accel_eval.tune.pipeline_search import HELD_OUT, HELD_OUT_FIRST
from dit_accel_pipelines.generation.solvers import BEST

REPORTS = ("report-wan-tiny", "report-flux-tiny")
"""The suites of `make report`."""

TUNED = Path("eval/results/tuned-flux-tiny.toml")
TUNED_MODEL = "flux-tiny"

DEMO = Path("eval/results/demo.json")
"""The demo's committed run: a copy of its ``comparison.json``."""


def report_table(root: Path) -> str:
    """Return the committed report's arms, those first that are furthest ahead of the best dense runs by time."""
    heads = "model | setting and steps | time in dense steps | PSNR to converged, dB (median) | LPIPS | score "
    heads += "| against the best dense run of equal work, dB (median) | of equal time"
    rows = []
    for name in REPORTS:
        suite = read_suite(root / f"eval/suites/{name}.toml")
        lines = result_lines(root / f"eval/results/{name}.jsonl")
        arms = [arm for arm in suite_figures(suite, lines) if "steps_in_time" in arm.ahead or arm.saved_nothing]
        arms.sort(key=lambda arm: math.inf if arm.saved_nothing else -arm.ahead["steps_in_time"].mean)
        for arm in arms:
            row = (suite.model, arm.name, f"{arm.means['steps_in_time']:.1f}", arm.psnr.cell(".1f"))
            row += (f"{arm.metrics['lpips@alex'].mean:.3f}", f"{arm.means['score']:.0%}")
            row += tuple(
                NOTHING if arm.saved_nothing else arm.ahead[by].judged("+.1f") for by in ("work", "steps_in_time")
            )
            rows.append(row)
    return markdown_table(heads, rows)


def score_words(lines: Sequence[ResultLine]) -> str:
    """Return in words which arms the model's own judge tells from the dense runs of equal work; "" without scores."""
    comparison = Comparison(line for line in lines if line.is_converged)
    leads = {name: comparison.leads(name, "work", "score").values() for name, _ in comparison.lines}
    judged = judge({name: [100 * lead for lead in values] for name, values in leads.items()})
    if not judged:
        return ""
    arms = [f"{name} ({gap.judged('+.0f')})" for name, gap in judged.items() if gap.verdict not in ("open", TOO_FEW)]
    if arms:
        return f"By the model's judge these differ from the dense runs of equal work, in points: {'; '.join(arms)}."
    means = [gap.mean for gap in judged.values()]
    reach = reach_words(judged.values(), "points")
    return (
        f"**The model's judge can't tell these {len(judged)} arms from the dense runs of equal work**: its score "
        f"differs by {min(means):+.1f} to {max(means):+.1f} points"
        + (f", with {reach}, within which it tells nothing." if reach else ".")
    )


def tuned_text(root: Path) -> str:
    """Return what the committed search found: what was judged on prompts that it never saw, in a table."""
    chosen = re.match(r"# (.+), by dit-accel tune pipeline", (root / TUNED).read_text(encoding="utf-8"))
    assert chosen is not None, f"{TUNED} does not begin with the setting that was chosen"
    lines = result_lines((root / TUNED).with_suffix(".runs.jsonl"))
    steps = int(model_defaults(TUNED_MODEL)["num_inference_steps"])
    names = list(dict.fromkeys(line.arm for line in lines if line.clip >= HELD_OUT_FIRST))
    rows = []
    for name in names:
        held = {line.clip: line for line in lines if line.arm == name and line.clip >= HELD_OUT_FIRST}
        if len(held) == HELD_OUT:
            work = float(np.mean([line.work for line in held.values()]))
            psnr = clip_mean([line.psnr for line in held.values()])
            rows.append((name, f"{work:.1f}", f"{steps / work:.2f}", f"{psnr:.1f}"))
    tried = len({line.arm for line in lines if not line.arm.startswith(f"{BEST} ")})
    head = (
        f"`dit-accel tune pipeline --model {TUNED_MODEL} --target {TARGET} -o {TUNED}` tried {tried} settings besides "
        f"UniPC's of fewer steps, on 2, 4 and 6 prompts, and took **{chosen[1]}**. What was judged on {HELD_OUT} "
        "prompts that it never saw:"
    )
    heads = "setting | work in dense steps | speed-up over its own steps by work | PSNR to converged, dB"
    return f"{head}\n\n{markdown_table(heads, rows)}"


TARGET = "psnr=30"
"""The target of the committed search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverPrompts:
    """How far a preset is ahead in dB of fewer steps of equal ``time`` or ``own work``, over the prompts that judge."""

    lead: Judged
    by: str

    def __str__(self) -> str:
        return (
            f"over {self.lead.count} prompts that did not choose it the preset is {self.lead:+.1f} dB ahead of dense "
            f"runs of equal {self.by}: {self.lead.verdict}"
        )


def over_prompts(root: Path, model: str, level: str) -> OverPrompts | None:
    """Return a preset's lead over fewer steps in its committed suite below the project's root folder; None without."""
    path = root / f"eval/suites/presets-{model}.toml"
    lines = result_lines(root / f"eval/results/presets-{model}.jsonl")
    arms = suite_figures(read_suite(path), lines) if path.is_file() and lines else []
    ahead = next((arm.ahead for arm in arms if arm.name == level), {})
    key = next((key for key in ("steps_in_time", "work") if key in ahead), None)
    return None if key is None else OverPrompts(lead=ahead[key], by=(WORKS | TIMED)[key])


def demo_text(root: Path) -> str:
    """Return in a sentence what the committed run below the project's root folder showed, and what over prompts."""
    run = json.loads((root / DEMO).read_text(encoding="utf-8"))
    figures = over_prompts(root, run["model"], run["arms"][-1]["arm"].removeprefix("preset "))
    return _demo_text(run) + (f" That is one prompt; {figures}." if figures else "")


def _demo_text(run: dict[str, Any]) -> str:
    whole, took, ours = (float(np.median(arm.get("call_seconds", arm["seconds"]))) for arm in run["arms"])
    _, fewer, preset = run["arms"]
    differences = [psnr - rival for psnr, rival in zip(preset["psnr"], fewer["psnr"], strict=True)]
    lead = judge({"preset": differences})["preset"]
    plain = f"as much time spent on fewer steps ({fewer['num_inference_steps']}, in {took:.1f} s)"
    words = {
        "ahead": f"nearer to the full run than {plain}",
        "behind": f"farther from the full run than {plain}",
        "open": f"with no sure difference in distance to the full run from {plain}",
        TOO_FEW: f"with too few seeds to compare its distance to the full run with {plain}",
    }[lead.verdict]
    threads = "one thread" if run["threads"] == 1 else f"{run['threads']} threads"
    return (
        f"**{whole / ours:.1f} times as fast** (the whole call, {ours:.1f} s for {whole:.1f}), and {words}: "
        f"{lead:+.1f} dB over {lead.count} seeds ({threads}, {run['device']}; [the run]({DEMO}))."
    )
