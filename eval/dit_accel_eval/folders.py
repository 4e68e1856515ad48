"""The commands on what lies in files: clips that any engine wrote, and results of several runs and people."""

from pathlib import Path
from typing import Annotated

import typer
from dit_accel_pipelines.generation.options import Quiet, option

from dit_accel import ConfigError
from dit_accel.cli.console import OUT, TALK, print_error, warn

from .compare_options import FurtherMetrics, KeepFrames


def compare_folders(
    reference: Annotated[Path, option("What clips should be: a folder of clips.", metavar="DIR")],
    arm: Annotated[list[str], option("Clips under test, by a name of yours; may be repeated.", metavar="NAME=DIR")],
    rival: Annotated[list[str] | None, option("What arms are held against; repeatable.", metavar="NAME=DIR")] = None,
    times: Annotated[Path | None, option("CSV of folder, seconds, and file if clips differ.", metavar="FILE")] = None,
    table: Annotated[Path | None, option("CSV of file, prompt, seed, where names don't tell.", metavar="FILE")] = None,
    output: Annotated[Path, option("Page to write.", "--output", "-o", metavar="FILE.html")] = Path("folders.html"),
    model: Annotated[str, option("What made the clips, for the title.")] = "clips",
    metric: FurtherMetrics = None,
    fps: Annotated[float, option("Frames per second of the clips.")] = 16.0,
    frames: KeepFrames = True,
    quiet: Quiet = False,
) -> None:
    """Compare folders of clips, whatever made them: as eval run does, without running a model.

    Clips are paired by prompt and seed. Both are read from --table; else from
    a JSON side-car, NAME.mp4.json or NAME.json, with prompt and seed; else
    clips of one name are a pair, and PROMPT-SEED.mp4 says both.

    With --times, or seconds in side-cars, arms are held against the curve of
    the rivals at equal time; else each against each rival.

    All that keeps clips from being compared is said before one is measured.
    Results lie beside the page: .jsonl a line a clip, .json a file to share.

    \b
    Examples:
      dit-accel eval folders --reference own50 --rival 25=own25 --arm fast=fast
    """
    from .comparing import check_page, show_results
    from .metrics.registered import check_names
    from .runs.pairing import REFERENCE, pair, read_rows
    from .suites.folders import measure_folders

    lines, shared, paths = check_page(output, beside=(".json",)), output.with_suffix(".json"), {REFERENCE: reference}
    named = [("rival", value) for value in rival or ()] + [("arm", value) for value in arm]
    for what, value in named:
        name, sign, path = value.partition("=")
        if not (name.strip() and sign and path):
            raise ConfigError(f"--{what} takes NAME=DIR, got {value!r}; write, say, --{what} mine=clips")
        if name in paths:
            raise ConfigError(f"{name!r} names two folders; give each a name of its own")
        paths[name] = Path(path)
    metrics = check_names(["lpips@alex"] if metric is None else metric)
    folders, problems = pair(paths, [row for path in (table, times) if path for row in read_rows(path)])
    for problem in problems:
        print_error(problem)
    if problems:
        raise typer.Exit(2)
    how = {"model": model, "metrics": metrics, "fps": fps, "frames": frames, "quiet": quiet}
    measure_folders(folders, [*paths][1 : 1 + len(rival or ())], lines, **how)
    show_results(lines, {"html": output, "json": shared}, quiet=quiet)
    if not quiet:
        TALK.print(f"written: {lines}, and to share {shared}", markup=False, soft_wrap=True)


def merge_results(
    results: Annotated[list[Path], typer.Argument(help="JSON files of runs, or their lines.", metavar="RUN.json ...")],
    output: Annotated[Path, option("File to write, .json.", "--output", "-o", metavar="FILE")],
) -> None:
    """Merge runs against one reference into one, so that all arms are judged together.

    Refused are runs of another model, call, reference or prompts, and a clip
    of an arm that two of them tell otherwise.

    \b
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
    output: Annotated[Path, option("Page to write, an .html.", "--output", "-o", metavar="FILE")] = Path("board.html"),
) -> None:
    """Show all runs of a folder on one page: the rules on top, arms to be sorted and filtered.

    Runs are the files that eval report --json, eval folders and eval merge
    write; figures are made anew from their lines. Results of fastvideo eval
    and of VBench stand below, as they are.

    \b
    Examples:
      dit-accel eval board runs -o board.html
    """
    from dit_accel.files import check_writable, write_text

    from .report.board import board_page, read_board

    if output.suffix != ".html":
        raise ConfigError(f"the board must be a .html, got {output}; write, say, -o {output.with_suffix('.html')}")
    check_writable(output, "the board")
    board = read_board(folder)
    for name, reason in board.unread.items():
        warn(f"{name} is not shown: {reason}")
    write_text(output, board_page(board, folder, output))
    OUT.print(str(output), markup=False, soft_wrap=True)
