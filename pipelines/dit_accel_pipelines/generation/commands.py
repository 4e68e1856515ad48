"""The commands `generate` and `describe` of the command line."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.cli import MethodList, RunTable
from dit_accel.cli.console import OUT, TALK, print_json
from dit_accel.cli.stopping import STOP
from dit_accel.errors import ConfigError

from .options import RUN, Json, Model, Quiet, RunOptions, option, require_one_document, with_option_fields
from .ranges import between, check_ranges

if TYPE_CHECKING:
    from .batch import Planned
    from .generate import Written
    from .request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions(RunOptions):
    """What `generate` is given; most are the request's own fields."""

    prompt: Annotated[str | None, typer.Argument(help="What to show.", hidden=True)] = None
    output: Annotated[
        Path, option("What to write or replace: .mp4, .webm, .gif, .png, or frames/.", "--output", "-o", metavar="FILE")
    ] = Path("out.mp4")
    prompt_file: Annotated[
        Path | None, option("A prompt per line; .csv or .jsonl: with any option, named as its flag.", metavar="FILE")
    ] = None
    seeds: Annotated[
        str | None, option("Each prompt with each of these seeds, such as 0-3 or 0,5,9.", metavar="SEEDS")
    ] = None
    grid: Annotated[
        Sequence[str],
        option("Each prompt with each value, and a contact sheet beside; may be repeated.", metavar="NAME=A,B"),
    ] = ()
    dry_run: Annotated[bool, option("Say what would run, its memory and time; load nothing.", "--dry-run")] = False
    same_seed: Annotated[bool, option("One seed for all prompts of a file.", "--same-seed")] = False
    resume: Annotated[bool, option("Keep outputs that an earlier run of the same request wrote.", "--resume")] = False
    quiet: Quiet = False
    json: Json = False
    gpus: Annotated[
        int, option("Start so many processes, a device each, that share the prompts.", panel=RUN), between(1, 1024)
    ] = 1
    ulysses: Annotated[int, option("Processes that share each output.", panel=RUN)] = 1
    cfg_parallel: Annotated[bool, option("Not in this diffusers.", "--cfg-parallel", hidden=True)] = False

    def __post_init__(self) -> None:
        check_ranges(self)


@with_option_fields
def generate_video(options: GenerateOptions, *, context: typer.Context, methods: MethodList, run: RunTable) -> None:
    """Generate a video (or image), with methods attached.

    Writes FILE, and FILE.json beside it: all that is needed to repeat the
    run, and the report of what ran. Both appear whole or not at all, in place
    of what is there. Several outputs are FILE-01, FILE-02 and so on; each
    prompt has the next seed. A .png holds one frame, or some of a video's.
    --config FILE may set every option in its table \\[run], and be FILE.json
    of an earlier output, which repeats it; the command line wins.

    With --gpus N (or under accelerate launch or torchrun) each of N processes
    makes every N-th prompt; with --ulysses N, N make each output together.

    \b
    Examples:
      dit-accel generate "a red circle moving right" --radial -o red.mp4
      dit-accel generate "a red circle" --preset balanced --check
      dit-accel generate "a kite" --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
      dit-accel generate --prompt-file prompts.txt --gpus 4 --resume
    """
    from ..processes.launching import launch, refuse_cfg_parallel, starts_processes
    from ..processes.processes import Process, started_process
    from .batch import planned
    from .dry_run import print_dry_run
    from .generate import generate, resolved_requests
    from .progress import Stages

    options = _with_table(options, context, run)
    refuse_cfg_parallel(options.cfg_parallel)
    starts = starts_processes(options.gpus, options.device, together=options.ulysses)
    process = Process() if starts else started_process(together=options.ulysses)
    many = process.count > 1
    require_one_document(options.json, options.gpus if starts else process.count)
    outputs = planned(options, methods)
    requests, notes = [output.request for output in outputs], tuple(_defaults(options, outputs[0].request))
    if options.dry_run:
        with Stages(quiet=options.quiet) as stages:
            made = resolved_requests(requests, stages, notes, together=options.ulysses)
        print_dry_run([request for request, _ in made], json=options.json)
        return
    if len(requests) > 1:
        STOP.files = "outputs that were made are whole, and the same command with --resume makes the others"
    if starts:
        resolved_requests(requests, Stages(silent=True), together=options.ulysses)
        raise typer.Exit(launch(options.gpus, sys.argv[1:]))
    with Stages(quiet=options.quiet, silent=process.rank > 0) as stages:
        shown = {"on_written": _line} if many else {}
        written = generate(
            requests, stages=stages, command=sys.argv, process=process, resume=options.resume, notes=notes, **shown
        )
    _show(options, outputs, written, alone=not many)


def _show(options: GenerateOptions, outputs: "Sequence[Planned]", written: "Sequence[Written]", *, alone: bool) -> None:
    """Write the contact sheet of a grid, and print what one process wrote; of several each has printed its own."""
    from .grid_sheet import write_sheet

    sheet = write_sheet(outputs, options.output) if options.grid else None
    if sheet and not options.quiet:
        TALK.print(f"contact sheet: {sheet}", markup=False, soft_wrap=True)
    if options.json:
        print_json([output.record for output in written])
        return
    for output in written if alone else ():
        print(output.record["output"])
        if not options.quiet:
            _print_written(output)


def _defaults(options: GenerateOptions, request: "Request") -> Iterator[str]:
    """Give what a user should know of what was taken because it was not named."""
    from .request import EMBEDDED

    if options.model is None:
        yield f"no --model was given, so {EMBEDDED} is taken, a tiny model that is embedded here"
    if not request.attaches and options.preset is None:
        yield "no method is attached, so this is the model as it is; --preset balanced attaches what is chosen for it"


def _with_table(options: GenerateOptions, context: typer.Context, run: dict[str, Any]) -> GenerateOptions:
    """Return options with what a config's table sets, where the command line does not."""
    from .named import read_named

    named = read_named(GenerateOptions, run, "the table [run] of --config")
    if named.methods:
        name = next(iter(named.methods))
        raise ConfigError(f"the table [run] of --config has {name!r}, a method; write a table of its own, [{name}]")
    typed = {
        field.name
        for field in dataclasses.fields(options)
        if getattr(context.get_parameter_source(field.name), "name", "") == "COMMANDLINE"
    }
    if "solver" in typed:
        typed.add("flow_shift")  # a config's is that of its own solver
    if typed & {"prompt", "prompt_file"}:
        typed |= {"prompt", "prompt_file"}
    if typed & {"seed", "seeds"}:
        typed |= {"seed", "seeds"}
    return dataclasses.replace(options, **{name: v for name, v in named.options.items() if name not in typed})


def describe_model(
    model: Model = None,
    options: Annotated[bool, typer.Option("--options", help="Every method's options on this model instead.")] = False,
    json: Json = False,
) -> None:
    """Tell what to attach to a model, and which methods it takes; no weights.

    \b
    Examples:
      dit-accel describe
      dit-accel describe --options
      dit-accel describe --model Wan-AI/Wan2.2-T2V-A14B-Diffusers --json
    """
    import dit_accel

    from .loading import empty_transformers
    from .pipeline_call import files_taken

    pipe = empty_transformers(model)
    description, files = dit_accel.describe(pipe), files_taken(pipe.config["_name_or_path"])
    if json:
        print_json({**description.to_dict(), "files": files})
        return
    OUT.print(description.options() if options else str(description), soft_wrap=True, markup=False)
    if files and not options:
        OUT.print(f"generate starts from: {', '.join(files)}", soft_wrap=True, markup=False)


def _line(output: "Written") -> None:
    """Print an output in one write, so that lines of several processes stay whole."""
    sys.stdout.write(f"{output.record['output']}\n")
    sys.stdout.flush()


def _print_written(output: "Written") -> None:
    if output.kept:
        TALK.print("kept: its side-car tells the same request", markup=False, soft_wrap=True)
        return
    steps, seconds = output.record["num_inference_steps"], output.record["seconds"]
    text = f"{steps} steps in {seconds['denoise']:.1f} s, decoded in {seconds['decode']:.1f} s"
    lines = [text, *([str(output.report)] if output.report else [])]
    if output.check:
        lines += [f"check: {output.check}", f"both and their difference: {output.record['check']['picture']}"]
    TALK.print("\n".join(lines), markup=False, soft_wrap=True)
