"""The command `dit-accel eval vbench`; what it needs is loaded when it runs."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from dit_accel_pipelines.options import Json

from dit_accel import ConfigError
from dit_accel.cli.console import OUT, TALK, plain_table, print_error, print_json, warn

if TYPE_CHECKING:
    from .prompts import Wanted
    from .run import Job

VIDEOS = "Videos"


def evaluate(
    totals: Annotated[
        Path | None,
        typer.Option(help="JSON of all sixteen raw scores, of which to print the totals.", metavar="SCORES.json"),
    ] = None,
    videos: Annotated[
        Path | None,
        typer.Option(help="Folder of videos {prompt}-{i}.mp4.", rich_help_panel=VIDEOS, metavar="DIR"),
    ] = None,
    dimension: Annotated[
        list[str] | None,
        typer.Option(
            "--dimension", "-d", help="May be repeated. Default: all that can be measured here.", rich_help_panel=VIDEOS
        ),
    ] = None,
    full_info: Annotated[
        Path | None,
        typer.Option(help="Official prompts; default: the vbench package's.", rich_help_panel=VIDEOS, metavar="JSON"),
    ] = None,
    samples: Annotated[int, typer.Option(help="Videos of each prompt.", rich_help_panel=VIDEOS, min=1)] = 5,
    filtered: Annotated[
        bool,
        typer.Option("--filtered", help="temporal_flickering's videos passed its filter.", rich_help_panel=VIDEOS),
    ] = False,
    custom: Annotated[
        bool, typer.Option("--custom", help="Any videos, of prompts of one's own.", rich_help_panel=VIDEOS)
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSON {file name: prompt}; default: the files' names.", rich_help_panel=VIDEOS, metavar="JSON"
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Weights, laid out as VBench's cache; default: see eval setup --tier 2.",
            rich_help_panel=VIDEOS,
            metavar="DIR",
        ),
    ] = None,
    observations: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines of what GRiT, Tag2Text or UMT saw elsewhere.", rich_help_panel=VIDEOS, metavar="FILE"
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the results.", rich_help_panel=VIDEOS, metavar="DIR")
    ] = Path("vbench"),
    name: Annotated[
        str | None, typer.Option(help="What result files begin with; default: the videos' folder.", metavar="NAME")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the networks run.", rich_help_panel=VIDEOS)] = "cpu",
    json: Json = False,
) -> None:
    """Measure videos by VBench's sixteen dimensions, and give its totals where all are there.

    Scores are VBench's own or none: a dimension whose network is missing is
    named, with what to put where. Each video's score is kept as it is measured,
    so a run that was stopped goes on. The result files are laid out as VBench's.

    Examples:

    dit-accel eval vbench --totals scores.json --json

    dit-accel eval vbench --videos out/ -d subject_consistency -d dynamic_degree

    dit-accel eval vbench --videos out/ --custom -d temporal_flickering --json
    """
    if (totals is None) == (videos is None):
        raise ConfigError("name either raw scores with --totals or a folder of videos with --videos")
    if totals is not None:
        _print_totals(totals, json)
        return
    assert videos is not None
    from .measures import Means
    from .networks import Networks
    from .observations import read_observations
    from .run import Job
    from .run import evaluate as measured
    from .weight_files import default_folder

    means = Means(
        networks=Networks(folder or default_folder(), device), observations=read_observations(observations)
    )  # fmt: skip
    job = Job(
        name=name or videos.resolve().name, output=output, means=means, warn=warn,
        tell=lambda text: TALK.print(text, markup=False, soft_wrap=True),
    )  # fmt: skip
    if prompts is not None and not custom:
        raise ConfigError("--prompts tells prompts of one's own; add --custom")
    names = _names(dimension or (), custom, job)
    wanted = _wanted(job, names, videos, custom, prompts, full_info, samples, filtered)
    found = measured(job, wanted)
    _print_scores(found, job, whole=samples == 5 and not custom, json=json)


def _names(asked: Sequence[str], custom: bool, job: "Job") -> list[str]:
    """Return the dimensions to measure, and tell which can't be.

    Raises:
        ConfigError: for unknown ones, ones given twice, and asked ones that can't be measured.
    """
    from .dimensions import DIMENSIONS
    from .dimensions import dimension as known
    from .prompts import ASKED, check_custom
    from .run import check_job, measurable

    names = [known(name).name for name in asked] or [name for name in DIMENSIONS if not (custom and name in ASKED)]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ConfigError(f"dimension {double} is given twice; leave one out")
    if custom:
        check_custom(names)
    here, reasons = measurable(names, job.means)
    if reasons and (asked or not here):
        raise ConfigError("; ".join(f"{name} can't be measured: {reason}" for name, reason in reasons.items()))
    for name, reason in reasons.items():
        warn(f"{name} is left out: {reason}")
    check_job(job)
    return here


def _wanted(
    job: "Job", names: Sequence[str], videos: Path, custom: bool, told: Path | None, full_info: Path | None,
    samples: int, filtered: bool,
) -> "dict[str, list[Wanted]]":  # fmt: skip
    """Return dimension -> its videos; all that is missing is told before anything is measured."""
    from . import official
    from .prompts import FLICKERING, custom_videos, read_prompts, unused, videos_of
    from .run import already_filtered
    from .run import filtered as filter_videos

    if custom:
        if FLICKERING in names:
            warn(f"{FLICKERING} can't tell flicker from motion; give videos that stand still")
        every = custom_videos(videos, told, names)
        return {name: every for name in names}
    prompts = read_prompts(official.prompts_path(full_info))
    wanted = {name: videos_of(prompts, videos, name, samples) for name in names if name != FLICKERING}
    if FLICKERING in names:
        wanted[FLICKERING] = (already_filtered if filtered else filter_videos)(job, prompts, videos)
    strays = unused(prompts, videos, samples)
    if strays:
        warn(f"{len(strays)} videos belong to no prompt, or lie beyond the samples, such as {strays[0]!r}")
    return {name: wanted[name] for name in names}


def _print_scores(found: dict[str, list[Any]], job: "Job", *, whole: bool, json: bool) -> None:
    from .dimensions import DIMENSIONS
    from .totals import totals

    scores = {name: held[0] for name, held in found.items()}
    sums = asdict(totals(scores)) if whole and len(scores) == len(DIMENSIONS) else None
    if json:
        print_json({"scores": scores, "totals": sums, "results": str(job.results)})
        return
    table = plain_table("dimension", "score", "videos", right=("score", "videos"))
    for name, (score, entries) in found.items():
        table.add_row(name, f"{score:.4f}", str(len(entries)))
    OUT.print(table)
    if sums is not None:
        OUT.print(f"Quality {100 * sums['quality']:.2f}  Semantic {100 * sums['semantic']:.2f}  "
                  f"Total {100 * sums['total']:.2f}")  # fmt: skip
    TALK.print(f"written to {job.results}", markup=False, soft_wrap=True)


def _print_totals(path: Path, json: bool) -> None:
    from .dimensions import DIMENSIONS
    from .totals import read_scores, totals

    raw = read_scores(path)
    found = totals(raw)
    if json:
        print_json(asdict(found))
        return
    table = plain_table("dimension", "group", "in its range", right=("in its range",))
    for name, value in found.normalized.items():
        table.add_row(name, DIMENSIONS[name].group, f"{100 * value:.2f}")
    OUT.print(table)
    OUT.print(f"Quality {100 * found.quality:.2f}  Semantic {100 * found.semantic:.2f}  Total {100 * found.total:.2f}")


def set_up(archives: Path | None, folder: Path | None, *, hub: bool, json: bool) -> None:
    """Unpack VBench's package, fetch what is on the hub where asked, and tell what is missing, where, with its hash.

    Raises:
        typer.Exit: with code 1 where something is missing or another.
    """
    from . import official
    from .weight_files import WEIGHT_FILES, default_folder, from_hub, state

    at = folder or default_folder()
    package = official.unpack(archives, lambda text: TALK.print(text, markup=False, soft_wrap=True))
    failed = [reason for name, one in WEIGHT_FILES.items() if hub and one.hub and (reason := from_hub(name, at))]
    states = {name: state(name, at) for name in WEIGHT_FILES}
    if json:
        print_json({"folder": str(at), "package": package, "weights": states})
    else:
        table = plain_table("weights", "here", "SHA-256")
        for name, held in states.items():
            hashed = held["sha256"] or held["expected"] or "its publisher tells none"
            table.add_row(name, "no" if held["reason"] else "yes", hashed)
        OUT.print(table)
    reasons = [*([] if package is None else [package]), *failed]
    reasons += [held["reason"] for held in states.values() if held["reason"]]
    for reason in reasons:
        print_error(reason)
    if reasons:
        raise typer.Exit(1)
