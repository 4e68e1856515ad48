"""The command `dit-accel eval judge`: a judge's preference between two arms, beside its bias and its agreement."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from dit_accel_pipelines.generation.options import Device, Json, option

from dit_accel.cli.console import OUT, note, print_json, warn


def ask_judge(
    results: Annotated[Path, typer.Argument(help="Results whose frames were kept.", metavar="RESULTS.jsonl")],
    arm: Annotated[str, option("The arm that is judged.")],
    judge: Annotated[str, option("likert=MODEL, videoscore2, FILE.py:CLASS, or a command.", metavar="JUDGE")],
    against: Annotated[str | None, option("The arm beside it; default: its references.")] = None,
    question: Annotated[list[str] | None, option("Of both clips; may be repeated. Default: the judge's own.")] = None,
    frames_seen: Annotated[int, option("Frames of a clip that are shown, evenly over it.", min=1)] = 16,
    fps: Annotated[float, typer.Option(help="Frames per second of the clips.", min=0.1)] = 16.0,
    output: Annotated[Path | None, option("Every answer, a JSON line each.", "--output", "-o", metavar="FILE")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Let a judge look at both clips of each prompt, in both orders, and say what its answers are worth.

    Preference: the arm's score above the other's, with its verdict after Holm's
    correction over the questions. Bias: what the clip shown first gains, and
    the share of pairs that the order turns round. Agreement: Spearman's rank
    correlation of the preference with the differences of each metric.

    \b
    Examples:
      dit-accel eval judge mine.jsonl --arm fast --judge videoscore2
      dit-accel eval judge mine.jsonl --arm fast --against easycache --judge "python my.py"
    """
    from dit_accel_pipelines.generation.progress import Stages

    from dit_accel.files import check_writable

    from ..report.lines import read_results
    from ..runs.results import write_lines
    from ..statistics import FEWEST
    from .asking import answers_of, ask, judge_named, pairs_of

    if output is not None:
        check_writable(output, "answers")
    pairs = pairs_of(read_results(results).lines, results.parent, arm, against, frames_seen, fps)
    chosen = judge_named(judge, device)
    if len(pairs) < FEWEST:
        warn(f"there are {len(pairs)} clips, and a verdict takes {FEWEST}")
    questions = [*dict.fromkeys(question or chosen.questions)]
    with Stages(quiet=json) as stages:
        stages.stage("questions", 2 * len(pairs) * len(questions))
        lines = ask(chosen, pairs, questions, stages.advance)
    if output is not None:
        write_lines(output, lines)
    figures = answers_of(lines, pairs)
    if json:
        said = {name: asdict(figure) for name, figure in figures.items()}
        return print_json({"judge": chosen.name, "clips": len(pairs), "questions": said})
    for name, figure in figures.items():
        agreement = ", ".join(f"{metric} {value:+.2f}" for metric, value in figure.agreement.items() if value)
        texts = [
            f"{name}\n  preference     {figure.preference:+.2f} {figure.preference.verdict}",
            f"  position bias  {figure.bias:+.2f}, {figure.turned:.0%} turned by the order",
            f"  agreement      {agreement or 'none'}",
        ]
        OUT.print("\n".join(texts), markup=False, soft_wrap=True)
    beside = f"that of {against}" if against else "the reference"
    note(f"{chosen.name}: {arm} above {beside}, {len(pairs)} clips in both orders; agreement is the rank correlation")
