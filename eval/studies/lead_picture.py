"""Draws what each setting of a report gains over fewer steps of equal time: `python eval/studies/lead_picture.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dit_accel_eval.runs.results import result_lines
from dit_accel_eval.suites.figures import ArmFigures, suite_figures
from dit_accel_eval.suites.suite import read_suite
from matplotlib.figure import Figure
from report_tables import REPORTS

from dit_accel.files import written_whole

PICTURE = Path("docs/evidence/leads.png")
TITLES = {"wan-tiny": "small video model", "flux-tiny": "small image model"}
COLOURS = {"ahead": "tab:green", "behind": "tab:red"}
"""Verdict -> colour; a difference that is not shown is grey."""


def draw(models: Mapping[str, Sequence[ArmFigures]], path: Path) -> None:
    """Write a PNG: a panel a model, a row a setting, at its lead in dB over the best dense runs of equal time."""
    shown = {
        model: sorted((arm for arm in arms if "steps_in_time" in arm.ahead), key=lambda arm: lead(arm).mean)
        for model, arms in models.items()
    }
    rows = [len(arms) for arms in shown.values()]
    figure = Figure(figsize=(7, 0.9 + 0.3 * sum(rows) + 0.6 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    for panel, (model, arms) in zip(panels, shown.items(), strict=True):
        panel.set_title(f"{TITLES[model]} ({model})", fontsize=10, loc="left")
        panel.axvline(0, color="k", linewidth=0.8)
        for row, ahead in enumerate(map(lead, arms)):
            colour = COLOURS.get(ahead.verdict, "tab:gray")
            panel.plot([ahead.low, ahead.high], [row, row], color=colour, linewidth=3, alpha=0.4, solid_capstyle="butt")
            panel.plot(ahead.mean, row, "o", color=colour)
        labels = [f"{arm.name} steps, in the time of {arm.means['steps_in_time']:.0f}" for arm in arms]
        panel.set_yticks(range(len(arms)), labels, fontsize=9)
        panel.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel("dB nearer to the full result")
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def lead(arm: ArmFigures):
    """Return an arm's lead at equal time."""
    return arm.ahead["steps_in_time"]


def main() -> None:
    """Draw the committed reports."""
    suites = [read_suite(Path(f"eval/suites/{name}.toml")) for name in REPORTS]
    lines = {suite.name: result_lines(Path(f"eval/results/{suite.name}.jsonl")) for suite in suites}
    draw({suite.model: suite_figures(suite, lines[suite.name]) for suite in suites}, PICTURE)


if __name__ == "__main__":
    main()
