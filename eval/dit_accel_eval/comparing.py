"""Runs what `dit-accel eval compare` is given as a suite, and shows it: a table, and a page with clips."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from dit_accel_pipelines.generation.media import check_encoder
from dit_accel_pipelines.generation.negative import with_negative
from dit_accel_pipelines.generation.options import fields_of
from dit_accel_pipelines.generation.pipeline_call import CallSignature, pipeline_class
from dit_accel_pipelines.generation.request import EMBEDDED, Request, embedded_name, read_prompts, resolve
from dit_accel_pipelines.processes.processes import started_process
from dit_accel_pipelines.processes.ranks import Ranks
from rich.table import Table

from dit_accel import ConfigError
from dit_accel.adapters.embedded import assets
from dit_accel.adapters.model_files import model_source, read_model_files
from dit_accel.cli.console import OUT, TALK, note, plain_table, warn
from dit_accel.cli.method_options import NamedSetting
from dit_accel.files import check_writable
from dit_accel.methods.base import Model
from dit_accel.methods.presets import preset_methods

from .compare_options import CompareOptions
from .metrics.registered import DYNAMICS, check_names, decimals_of
from .report.lines import read_results
from .report.report import SuiteReport, suite_report
from .report.writing import arm_rows, write_reports
from .runs.loaded import Machine, OwnClips, tuning_request
from .runs.model import OWN
from .runs.results import read_lines, result_lines
from .statistics import FEWEST, WRONG
from .suites.arms import read_arms
from .suites.figures import pairs_markdown
from .suites.job import SCALES, Job, clips_of
from .suites.reference import default_cache
from .suites.running import run_job
from .suites.suite import Suite

FIRST_CLIP, CLIPS, MOST_CLIPS = 48, 8, 16  # held-out prompts that chose no preset: the first, how many, at most


def run_comparison(options: CompareOptions, settings: Sequence[NamedSetting]) -> None:
    """Run settings on every prompt, and show how they stand."""
    lines, first = check_page(options.output), Ranks().first
    suite = suite_of(options, settings)
    names = {arm.name for arm in suite.arms}
    extra = {line.arm for line in result_lines(lines) if not line.is_rival} - names
    if extra:  # what is judged together is named before it runs
        listed, named = (", ".join(sorted(group)) for group in (extra, names))
        raise ConfigError(f"{lines} holds results of {listed}, which is none of {named}; name all settings in one "
                          "call, or another file with --output")  # fmt: skip
    if options.frames and suite.call.get("num_frames", 1) != 1:
        check_encoder("the page's clips need", "leave them out with --no-frames")
    job = Job(
        suite=suite, out=lines, cache=default_cache(), timed=options.timed, talk=not options.quiet,
        threads=(2 if options.timed else 1) if suite.embedded else None,
        frames=lines.with_suffix(".frames") if options.frames else None,
        machine=Machine(device=started_process().device(options.device), offload=options.offload),
    )  # fmt: skip
    clips = clips_of(suite, options.clips)
    if first and not options.quiet:  # before anything runs
        count = "1 setting" if len(suite.arms) == 1 else f"{len(suite.arms)} settings"
        whose = f"the model's own {suite.reference_steps} steps" if suite.reference_steps else "the converged run"
        note(f"PSNR of {count} to {whose} of the same prompt and seed, against that of dense runs of as much work")
        note(f"ahead or behind is what differs from 0 over the clips, by Student's t widened for skew and Holm's "
             f"correction over all settings ({WRONG:.0%}); else open")  # fmt: skip
        if len(clips) < FEWEST:
            more = "add prompts, or seeds: --seed 0 --seed 1"
            warn(f"too few clips for a verdict: {len(clips)}, and it takes {FEWEST}; {more}")
        if suite.many:
            warn(suite.many)
    run_job(job, clips, 1, quiet=options.quiet)
    if first:
        show_results(lines, {"html": options.output}, quiet=options.quiet)


def show_results(lines: Path, files: Mapping[str, Path], *, quiet: bool) -> None:
    """Write the page of results, and what else is wanted of `write_reports`; print how the arms stand."""
    report = suite_report(read_results(lines))
    write_reports([report], files)
    if not quiet:
        OUT.print(arms_table(report))
        if report.of_folders and report.pairs:
            print(pairs_markdown(report.pairs))
        TALK.print("\n".join(report.warnings), markup=False, soft_wrap=True)
    OUT.print(str(files["html"]), markup=False, soft_wrap=True)


def check_page(page: Path, beside: Sequence[str] = ()) -> Path:
    """Refuse a page that can't be written, or would take the place of something else; returns the lines' file."""
    lines, *folders = (page.with_suffix(suffix) for suffix in (".jsonl", ".frames", ".media", *beside))
    if page.suffix != ".html":
        raise ConfigError(f"the page must be a .html, got {page}; write, say, -o {page.with_suffix('.html')}")
    check_writable(page, "the page")
    if read_lines(lines):
        read_results(lines)  # refuses what no run wrote
    for path in (page, *folders) if not lines.exists() else ():
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise ConfigError(f"{path} is there, and no {lines} of the runs that made it; move it away, or name "
                              "another file with --output")  # fmt: skip
    return lines


def _prompts(options: CompareOptions, settings: Sequence[NamedSetting], model: str) -> tuple[str, ...]:
    """Return the prompts of one's own, () for held-out ones; refuse options that say nothing, or two things."""
    if not settings and not options.preset:
        raise ConfigError("eval compare got no setting; add, say, --easycache, --preset fast or --config FILE")
    if options.reference not in (OWN, "converged"):
        raise ConfigError(f"there is no reference {options.reference!r}; take own or converged")
    if options.prompts and options.prompt:
        raise ConfigError("eval compare takes --prompt or --prompts, got both; give one of them")
    listed = read_prompts(options.prompts, "--prompts") if options.prompts else tuple(options.prompt or ())
    if not listed and not embedded_name(options.model):
        raise ConfigError(f"eval compare has no prompts of its own for {model}; give some with --prompts FILE")
    if not listed and ((options.clips or 0) > MOST_CLIPS or options.seed):
        raise ConfigError(f"{model} has {MOST_CLIPS} held-out prompts for this, each with its seed; add --prompts FILE")
    return listed


def suite_of(options: CompareOptions, settings: Sequence[NamedSetting]) -> Suite:
    """Return what is run: the model, the prompts, and an arm of each setting."""
    model, embedded = options.model or EMBEDDED, embedded_name(options.model)
    read_model_files(model_source(model))  # first of all, so that a misspelt name is refused as such
    listed = _prompts(options, settings, model)
    clips = OwnClips(prompts=listed, seeds=tuple(options.seed or ())) if listed else None
    values = {name: value for name, value in fields_of(Request, options).items()
             if name not in ("output", "prompt", "seed", "preset")}  # fmt: skip
    settled = resolve(tuning_request(
        prompts=listed or tuple(assets().held_out_prompts(model, 1)), num_inference_steps=options.steps, **values
    ))  # fmt: skip
    for text in (*settled.notes, *settled.warnings):
        note(text)
    request, steps = settled.request, settled.request.num_inference_steps or 0
    arms = [_arm(setting, request) for setting in (*_presets(options, request), *settings)]
    reference = {"reference_steps": steps, "reference_solver": options.solver or OWN}
    return Suite(
        name=options.output.stem, model=model, clips=len(clips) if clips else options.clips or CLIPS, own=clips,
        first_clip=0 if clips else FIRST_CLIP, call=_call(request), arms=read_arms(arms, Path("eval compare")),
        metrics=check_names(["lpips@alex"] if options.metric is None else options.metric),
        warmup=int(options.timed),  # of compilation, races and allocators, which the first call would pay for
        dtype=None if embedded else cast("Any", request.dtype), **(reference if options.reference == "own" else {}),
    )  # fmt: skip


def _call(request: Request) -> dict[str, Any]:
    """Return the arguments of the pipeline's call as `generate` sets them, without the steps."""
    taken = CallSignature.of(pipeline_class(read_model_files(request.source)))
    call = {**request.call_arguments(), **request.beside(taken)}
    return {key: value for key, value in call.items() if key != "num_inference_steps"}


def _presets(options: CompareOptions, request: Request) -> list[NamedSetting]:
    """Return the settings that presets are on the model."""
    settings, (adapter, family) = list[NamedSetting](), read_model_files(request.source).identify()
    for level in options.preset or ():
        model = Model(adapter=adapter, family=family, heads=family.heads, layers=family.layers)
        preset = preset_methods(level, model)
        if not preset.chosen:
            raise ConfigError(f"{preset.words()}; leave it out")
        if not options.quiet:
            note(preset.words())
        settings.append(NamedSetting(name=level, methods=preset.configs, run={}))
    return settings


def _arm(setting: NamedSetting, request: Request) -> dict[str, Any]:
    """Return a setting as the table of a suite's arm; what its file says of the run holds, but for a named solver."""
    run = {"num_inference_steps": request.num_inference_steps, "solver": OWN, **setting.run}
    if request.solver is not None:
        run = {**run, "solver": request.solver, "flow_shift": None}
    scale = run.pop("guidance_scale", None)
    if scale is not None:
        call = _call(dataclasses.replace(request, guidance_scale=scale))
        run["call"] = {key: value for key, value in call.items() if key in SCALES}
    methods = (with_negative(method, request.negative_prompt) for method in setting.methods)
    tables = {method.name: method.to_dict() for method in methods}
    return {"name": setting.name, **{key: value for key, value in run.items() if value is not None}, **tables}


def arms_table(report: SuiteReport) -> Table:
    """Return a table of a report's arms, those furthest ahead first: what each saves, how near it comes, its lead.

    Of clips in folders their rivals stand below.
    """
    main, whole, further = report.main, report.full_steps, report.further
    rows = arm_rows(report, report.arms if report.of_folders else report.judged, {})
    arms = [row["arm"] for row in rows]
    moved = [name for name in DYNAMICS if any(name in arm.dynamics for arm in arms)]
    heads = ["PSNR, dB (median)", *further, *filter(None, [", ".join(DYNAMICS[name].head for name in moved)])]
    if main in arms[0].means:
        heads = [f"{'time' if main == 'steps_in_time' else 'work'}, of {whole} steps", "speed-up", *heads]
        heads += ["ahead of fewer steps, dB", "verdict"]
    table = plain_table("setting", *heads, right=tuple(heads[:-1]))
    for row in rows:
        arm, lead, steps = row["arm"], row["lead"], row["arm"].means.get(main)
        cells = [f"{steps:.2f}", f"{whole / steps:.2f}"] if steps else []
        cells += [f"{arm.psnr.mean:.2f} ({arm.psnr.median:.2f})"]
        means = {name: f"{value.mean:.{decimals_of(name)}f}" for name, value in arm.metrics.items()}
        cells += [means.get(name, "") for name in further]
        dynamics = (f"{arm.dynamics[name].mean:+.1f}" for name in moved if name in arm.dynamics)
        cells += [", ".join(dynamics)] if moved else []
        stands = [f"{lead:+}" if lead else "", row["verdict"]]
        table.add_row(arm.name, *cells, *(stands if steps else []))
    return table
