"""The commands `generate` and `describe` of the command line."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dit_accel.cli import MethodList, RunTable
from dit_accel.cli.console import OUT, TALK, print_json
from dit_accel.cli.stopping import STOP
from dit_accel.errors import ConfigError

from .options import (
    FILES,
    RUN,
    Json,
    Model,
    Quiet,
    RunOptions,
    fields_of,
    option,
    require_one_document,
    with_option_fields,
)  # fmt: skip
from .ranges import between, check_ranges

if TYPE_CHECKING:
    from .generate import Written
    from .request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions(RunOptions):
    """What `generate` is given; most are the request's own fields."""

    prompt: Annotated[str | None, typer.Argument(help="What to show.")] = None
    output: Annotated[
        Path,
        option("What to write or replace: .mp4, .webm, .gif, .png, or frames/.", "--output", "-o", metavar="FILE"),
    ] = Path("out.mp4")
    prompt_file: Annotated[
        Path | None, option("Text file, a prompt per line; # begins a comment.", panel=FILES, metavar="FILE")
    ] = None
    same_seed: Annotated[bool, option("One seed for all prompts of a file.", "--same-seed", panel=FILES)] = False
    resume: Annotated[
        bool, option("Keep outputs that an earlier run of the same request wrote.", "--resume", panel=FILES)
    ] = False
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
def generate_video(options: GenerateOptions, *, methods: MethodList, run: RunTable) -> None:
    """Generate a video (or image), with methods attached.

    Writes FILE, and FILE.json beside it: all that is needed to repeat the
    run, and the report of what ran. Both appear whole or not at all, in place
    of what is there. Several prompts give FILE-01, FILE-02 and so on, each
    from the next seed. A .png holds one frame, or some of a video's.

    With --gpus N (or under accelerate launch or torchrun) each of N processes
    makes every N-th prompt; with --ulysses N, N make each output together.

    Examples:

    dit-accel generate "a red circle moving right" --radial -o red.mp4

    dit-accel generate "a red circle" --preset balanced --check

    dit-accel generate "a kite" --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers

    dit-accel generate --prompt-file prompts.txt --gpus 4 --resume
    """
    from ..processes.launching import launch, refuse_cfg_parallel, starts_processes
    from ..processes.processes import Process, started_process
    from .batch import singles
    from .generate import check_requests, generate
    from .progress import Stages
    from .request import Request

    prompts = _prompts(options)
    refuse_cfg_parallel(options.cfg_parallel)
    starts = starts_processes(options.gpus, options.device, together=options.ulysses)
    process = Process() if starts else started_process(together=options.ulysses)
    many = process.count > 1
    require_one_document(options.json, options.gpus if starts else process.count)
    fields = fields_of(Request, options)
    fields |= {name: run.get(name) for name in ("num_inference_steps", "guidance_scale") if fields[name] is None}
    if not options.solver:
        shift = run.get("flow_shift") if options.flow_shift is None else options.flow_shift
        fields |= {"solver": run.get("solver"), "flow_shift": shift}
    requests = [
        Request(**{**fields, "prompt": prompt, "output": output, "seed": seed, "methods": tuple(methods)})
        for prompt, output, seed in singles(prompts, options.output, options.seed, same_seed=options.same_seed)
    ]
    if len(requests) > 1:
        STOP.files = "outputs that were made are whole, and the same command with --resume makes the others"
    if starts:
        check_requests(requests, options.ulysses)
        raise typer.Exit(launch(options.gpus, sys.argv[1:]))
    with Stages(quiet=options.quiet, silent=process.rank > 0) as stages:
        shown = {"on_written": _line} if many else {}
        written = generate(
            requests, stages=stages, command=sys.argv, process=process, resume=options.resume,
            notes=tuple(_defaults(options, requests[0])), **shown,
        )  # fmt: skip
    if options.json:
        print_json([output.record for output in written])
        return
    for output in () if many else written:
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


def _prompts(options: GenerateOptions) -> tuple[str, ...]:
    """Return the prompts, named or from a file; `ConfigError` unless there is one of both."""
    from .request import read_prompts

    if options.prompt is not None and options.prompt_file is None:
        return (options.prompt,)
    if options.prompt is None and options.prompt_file is not None:
        return tuple(read_prompts(options.prompt_file))
    got = "neither" if options.prompt is None else "both"
    raise ConfigError(f"generate takes a prompt in quotes or --prompt-file, got {got}; give one of them")


def describe_model(
    model: Model = None,
    options: Annotated[bool, typer.Option("--options", help="Every method's options on this model instead.")] = False,
    json: Json = False,
) -> None:
    """Tell what to attach to a model, and which methods it takes; no weights.

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
