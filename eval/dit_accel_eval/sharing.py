"""The commands `dit-accel eval merge` and `dit-accel eval board`: results of several runs, also of other people."""

from pathlib import Path
from typing import Annotated

import typer
from dit_accel_pipelines.generation.options import option

from dit_accel import ConfigError
from dit_accel.cli.console import OUT, warn

Page = Annotated[Path, option("Page to write, .html; opens offline.", "--output", "-o", metavar="FILE")]


def merge_results(
    results: Annotated[list[Path], typer.Argument(help="JSON files of runs, or their lines.", metavar="RUN.json ...")],
    output: Annotated[Path, option("File to write, .json.", "--output", "-o", metavar="FILE")],
) -> None:
    """Merge runs against one reference into one, so that all arms are judged together.

    Refused are runs of another model, call, reference or prompts, and a clip
    of an arm that two of them tell otherwise.

    Examples:

    dit-accel eval merge ours.json theirs.json -o both.json
    """
    from .report.lines import merged_results, read_results
    from .report.report import suite_report
    from .report.writing import write_reports

    if output.suffix != ".json":
        raise ConfigError(f"a merged run is a .json, got {output}; write, say, -o {output.with_suffix('.json')}")
    together = merged_results([read_results(path) for path in results])
    write_reports([suite_report(together)], {"json": output})
    OUT.print(str(output), markup=False, soft_wrap=True)


def show_board(
    folder: Annotated[Path, typer.Argument(help="Folder of JSON files of runs.", metavar="DIR")],
    output: Page = Path("board.html"),
) -> None:
    """Show all runs of a folder on one page: the rules on top, arms to be sorted and filtered.

    Runs are the files that eval report --json, eval folders and eval merge
    write; figures are made anew from their lines. Results of fastvideo eval
    and of VBench stand below, as they are.

    Examples:

    dit-accel eval board runs -o board.html
    """
    from dit_accel.files import check_writable, written_whole

    from .report.board import board_page, read_board

    if output.suffix != ".html":
        raise ConfigError(f"the board must be a .html, got {output}; write, say, -o {output.with_suffix('.html')}")
    check_writable(output, "the board")
    board = read_board(folder)
    for name, reason in board.unread.items():
        warn(f"{name} is not shown: {reason}")
    with written_whole(output) as temporary:
        temporary.write_text(board_page(board, folder, output), encoding="utf-8")
    OUT.print(str(output), markup=False, soft_wrap=True)
