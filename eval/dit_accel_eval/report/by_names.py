"""The table of a report by VBench's names on the embedded world: a row a name, a column an arm."""

from dataclasses import dataclass

from ..runs.results import markdown_table
from ..suites.comparison import decimals_of, verdict
from ..vbench.world_metrics import WORLD
from .figures import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class ByNames:
    """The table.

    Attributes:
        arms: its columns: of the dense runs of most clips the one of most steps, then the others.
        rows: (name, clips that ask for it, cells); a cell is an arm's mean and, where it is no open question, how it
            stands beside dense UniPC of equal work.
    """

    arms: tuple[str, ...]
    rows: tuple[tuple[str, int, tuple[tuple[str, str], ...]], ...]


def by_names(report: Report) -> ByNames:
    """Return the table; without rows where the suite named none of these metrics."""
    dense = [arm for arm in report.arms if report.is_dense(arm)]
    most = max((arm.clips for arm in dense), default=0)
    dense = [arm for arm in dense if arm.clips == most]
    arms = [*dense[-1:], *(arm for arm in report.arms if not report.is_dense(arm))]
    rows = []
    for name in (one for one in report.further if one.endswith(WORLD)):
        requested = {line["clip"] for line in report.results.lines if name in line.get("metrics", {})}
        cells = []
        for arm in arms:
            stands = verdict(arm.differences[name], len(requested)) if name in arm.differences else "open"
            mean = f"{arm.metrics[name].mean:.{decimals_of(name)}f}" if name in arm.metrics else "–"
            cells.append((mean, "" if stands == "open" else stands))
        rows.append((name.removesuffix(WORLD), len(requested), tuple(cells)))
    return ByNames(arms=tuple(arm.name for arm in arms), rows=tuple(rows))


def markdown(table: ByNames) -> str:
    """Return it as Markdown, "" without rows."""
    if not table.rows:
        return ""
    rows = ((name, clips, *(" ".join(cell).strip() for cell in cells)) for name, clips, cells in table.rows)
    return markdown_table(" | ".join(["name@world", "clips", *table.arms]), rows)
