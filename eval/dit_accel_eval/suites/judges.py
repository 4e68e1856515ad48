"""The judges of clips that have no reference, by the name that a suite gives in ``judge``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..runs.model import Run, SuiteModel
from ..runs.results import Line
from ..vbench import scenes
from . import guided, larger, longer
from . import judged_by_vbench as judged
from .suite import Suite


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """How clips are judged by themselves.

    Attributes:
        measures: (model, clip's number, its run) -> what a line says of it; ``score`` among it.
        table: (suite, lines) -> the Markdown table.
        check: refuses a suite that can't be judged so; None: all can.
        numbers: (model's name, how many, the first) -> the clips that can be judged; None: all can.
    """

    measures: Callable[[SuiteModel, int, Run], Line]
    table: Callable[[Suite, Sequence[Line]], str]
    check: Callable[[Suite], None] | None = None
    numbers: Callable[[str, int, int], Sequence[int]] | None = None


JUDGES: Mapping[str, Judge] = {
    "longer": Judge(measures=longer.measures, table=longer.table),
    "larger": Judge(measures=larger.measures, table=larger.table),
    "guidance": Judge(measures=guided.measures, table=guided.table),
    "vbench": Judge(measures=judged.measures, table=judged.table, check=judged.check_suite, numbers=scenes.numbers),
}
"""Name, one of `suite.JUDGES` -> the judge."""
