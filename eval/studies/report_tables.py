"""What README.md and docs/quality.md say of the committed report, search and demo: `readme` puts it there."""

import json
import re
from pathlib import Path

import numpy as np
from dit_accel_eval.runs.results import markdown_table, read_lines
from dit_accel_eval.statistics import TOO_FEW, judge
from dit_accel_eval.suites.arms import Arm
from dit_accel_eval.suites.comparison import figures
from dit_accel_eval.suites.suite import read_suite
from dit_accel_eval.tune.pipeline_search import HELD_OUT, HELD_OUT_FIRST
from dit_accel_eval.tune.space import default_space

REPORTS = ("report-wan-tiny", "report-flux-tiny")
"""The suites of `make report`."""

TUNED = Path("eval/results/tuned-flux-tiny.toml")
TUNED_MODEL = "flux-tiny"

DEMO = Path("eval/results/demo.json")
"""The demo's committed run: a copy of its ``comparison.json``."""


def report_table(root: Path) -> str:
    """Return the arms of the committed report, those first that are furthest ahead of fewer steps.

    Args:
        root: the project's root folder.
    """
    heads = "model | setting and steps | work in dense steps | PSNR to converged, dB (median) "
    heads += "| against UniPC of equal work, dB (median)"
    rows = []
    for name in REPORTS:
        suite = read_suite(root / f"eval/suites/{name}.toml")
        lines = read_lines(root / f"eval/results/{name}.jsonl")
        if not lines:
            return "Not measured yet; `make report` does."
        arms = [arm for arm in figures(suite, lines) if "work" in arm.ahead]
        arms.sort(key=lambda arm: -arm.ahead["work"].mean)
        for arm in arms:
            row = (suite.model, arm.name, f"{arm.means['work']:.2f}", arm.psnr.cell(), arm.ahead["work"].judged())
            rows.append(row)
    return markdown_table(heads, rows)


def tuned_text(root: Path) -> str:
    """Return in words what the committed search found, beside the best arm set by hand that costs no more.

    Args:
        root: the project's root folder.
    """
    text = (root / TUNED).read_text(encoding="utf-8")
    found = re.match(r"# (.+), by dit-accel tune pipeline", text)
    assert found is not None, f"{TUNED} does not begin with the setting that was chosen"
    chosen = found[1]
    lines = read_lines((root / TUNED).with_suffix(".runs.jsonl"))
    space = default_space(TUNED_MODEL)
    tried = {arm.name for arm in space} & {line["arm"] for line in lines}
    held = [line for line in lines if line["arm"] == chosen and line["clip"] >= HELD_OUT_FIRST]
    psnr, work = (float(np.mean([line[key] for line in held])) for key in ("psnr", "work"))
    own = max(_plain(space), key=lambda arm: arm.num_inference_steps).num_inference_steps
    return (
        f"**Chosen by a search**: `dit-accel tune pipeline --model {TUNED_MODEL} --target {TARGET} -o {TUNED}` "
        f"tried {len(tried)} settings on 2, 4 and 6 prompts and took {chosen}: on {HELD_OUT} held-out prompts "
        f"{psnr:.1f} dB at {own / work:.2f} times the speed of the model's own {own} steps by counted work, "
        f"{work:.1f} steps' work. "
        f"{_by_hand(root, work)}"
    )


TARGET = "speedup=2"
"""What the committed search was asked for."""


def _plain(space: tuple[Arm, ...]) -> list[Arm]:
    return [arm for arm in space if arm.is_dense]


def _by_hand(root: Path, most: float) -> str:
    suite = read_suite(root / "eval/suites/held-out-flux-tiny.toml")
    arms = [arm for arm in figures(suite, read_lines(root / "eval/results/held-out-flux-tiny.jsonl"))
            if "work" in arm.ahead and arm.means["work"] <= most]  # fmt: skip
    if not arms:
        return "No arm set by hand costs as little on the same prompts."
    best = max(arms, key=lambda arm: arm.psnr.mean)
    return (
        f"Of the arms set by hand that cost no more on the same prompts the best, {best.name}, comes to "
        f"{best.psnr.mean:.1f} dB."
    )


def demo_text(root: Path) -> str:
    """Return in words what the committed run below the project's root folder showed."""
    run = json.loads((root / DEMO).read_text(encoding="utf-8"))
    _, fewer, ours = run["arms"]
    differences = [own - rival for own, rival in zip(ours["psnr"], fewer["psnr"], strict=True)]
    against = judge({"ours": differences})["ours"]
    threads = "one thread" if run["threads"] == 1 else f"{run['threads']} threads"
    seconds, rival = (f"{np.median(one['seconds']):.1f} s" for one in (ours, fewer))
    steps, where = fewer["num_inference_steps"], f"({threads}, {run['device']}; [the run]({DEMO}))."
    seeds = f"Over {len(ours['psnr'])} seeds"
    if against.verdict in ("open", TOO_FEW):
        why = {"open": "which is open", TOO_FEW: "too few for a verdict"}[against.verdict]
        return (
            f"{seeds} it shows no difference: ours came {against:+.1f} dB nearer to the converged run in the mean, "
            f"{against.median:+.1f} in the median, {why}; it took {seconds}, {steps} dense steps {rival} {where}"
        )
    return (
        f"{seeds} ours came {against:+.1f} dB (median {against.median:+.1f}) nearer to the converged run in {seconds} "
        f"than {steps} dense steps did in {rival} {where}"
    )
