"""The command `dit-accel eval vbench`; what it needs is loaded when it runs."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from dit_accel_pipelines.options import Json

from dit_accel import ConfigError
from dit_accel.cli import MethodList
from dit_accel.cli.console import OUT, TALK, plain_table, print_error, print_json, warn

if TYPE_CHECKING:
    from .prompts import Wanted
    from .run import Job

VIDEOS = "Videos"
MAKING = "Making videos"


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
    samples: Annotated[
        int | None, typer.Option(help="Videos of each prompt; default: 5.", rich_help_panel=VIDEOS, min=1)
    ] = None,
    subset: Annotated[
        int | None,
        typer.Option(help="Only the first so many prompts of each dimension.", rich_help_panel=VIDEOS, min=1),
    ] = None,
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
    generate: Annotated[
        bool, typer.Option("--generate", help="Make the videos instead of measuring them.", rich_help_panel=MAKING)
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, folder or embedded model.", rich_help_panel=MAKING, metavar="ID|FOLDER|NAME"),
    ] = None,
    height: Annotated[int | None, typer.Option(help="In pixels.", rich_help_panel=MAKING, metavar="PIXELS")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", rich_help_panel=MAKING, metavar="PIXELS")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of each.", rich_help_panel=MAKING)] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=MAKING)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance scale.", rich_help_panel=MAKING)] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of the files; default: as generate.", rich_help_panel=MAKING)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the model's weights.", rich_help_panel=MAKING, metavar="DTYPE")
    ] = None,
    offload: Annotated[
        str, typer.Option(help="none, model, sequential or group.", rich_help_panel=MAKING, metavar="HOW")
    ] = "none",
    seed: Annotated[int, typer.Option(help="Of the first prompt's first video.", rich_help_panel=MAKING)] = 0,
    shard: Annotated[
        str | None,
        typer.Option(help="The i-th of n shares of the work, i from 0.", rich_help_panel=MAKING, metavar="i/n"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Default: cpu for networks, the accelerator for --generate.", metavar="DEVICE")
    ] = None,
    json: Json = False,
    *,
    methods: MethodList,
) -> None:
    """Measure videos by VBench's sixteen dimensions, and give its totals where all are there.

    Scores are VBench's own or none: a dimension whose network is missing is
    named, with what to put where. Each video's score is kept as it is measured,
    so a run that was stopped goes on. The result files are laid out as VBench's.

    With --generate the videos are made: those of the dimensions' prompts that
    the folder lacks, each of another seed; what it costs is told first.

    Examples:

    dit-accel eval vbench --totals scores.json --json

    dit-accel eval vbench --videos out/ -d subject_consistency -d dynamic_degree

    dit-accel eval vbench --videos out/ --custom -d temporal_flickering --json

    dit-accel eval vbench --videos out/ --generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --radial --subset 1
    """
    if (totals is None) == (videos is None):
        raise ConfigError("name either raw scores with --totals or a folder of videos with --videos")
    if totals is not None:
        _print_totals(totals, json)
        return
    assert videos is not None
    if generate:
        making = {"model": model, "height": height, "width": width, "num_frames": num_frames, "fps": fps,
                  "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "dtype": dtype,
                  "device": device, "offload": offload, "methods": tuple(methods)}  # fmt: skip
        _generate(videos, dimension or (), full_info, samples, subset, seed, shard, making)
        return
    if methods or model is not None or shard is not None:
        raise ConfigError("a model, its methods and shards are for making videos; add --generate")
    if prompts is not None and not custom:
        raise ConfigError("--prompts tells prompts of one's own; add --custom")
    from .measures import Means
    from .networks import Networks
    from .observations import read_observations
    from .run import Job
    from .run import evaluate as measured
    from .weight_files import default_folder

    networks = Networks(folder or default_folder(), device or "cpu")
    job = Job(
        name=name or videos.resolve().name, output=output, warn=warn,
        means=Means(networks=networks, observations=read_observations(observations)),
        tell=lambda text: TALK.print(text, markup=False, soft_wrap=True),
    )  # fmt: skip
    source = Source(
        videos=videos, custom=custom, told=prompts, full_info=full_info, samples=samples or 5, filtered=filtered,
        subset=subset,
    )  # fmt: skip
    found = measured(job, source.wanted(job, dimension or ()))
    _print_scores(found, job, whole=samples in (None, 5) and subset is None and not custom, json=json)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the videos to be measured come from.

    Attributes:
        videos: their folder.
        custom: whether they are of prompts of one's own.
        told: file of those prompts.
        full_info: file of the official prompts; None: the package's.
        samples: videos of each prompt.
        filtered: whether temporal flickering's have passed its filter.
        subset: how many prompts of each dimension; None: all.
    """

    videos: Path
    custom: bool
    told: Path | None
    full_info: Path | None
    samples: int
    filtered: bool
    subset: int | None

    def wanted(self, job: "Job", asked: Sequence[str]) -> "dict[str, list[Wanted]]":
        """Return dimension -> its videos; all that is missing is told before anything is measured.

        Raises:
            ConfigError: for unknown dimensions, asked ones that can't be measured, and missing videos, by name.
        """
        from . import official
        from . import prompts as of_prompts
        from .run import already_filtered, check_job
        from .run import filtered as filter_videos

        _known(asked)
        of_prompts.check_folder(self.videos)
        if self.custom:
            of_prompts.check_custom(_known(asked))
            names = _measurable(job, asked, lambda name: name not in of_prompts.ASKED, still=True)
            if of_prompts.FLICKERING in names:
                warn(f"{of_prompts.FLICKERING} can't tell flicker from motion; give videos that stand still")
            own = of_prompts.custom_videos(self.videos, self.told, names)
            check_job(job)
            return dict.fromkeys(names, own)
        every = of_prompts.read_prompts(official.prompts_path(self.full_info))
        there = {name for one in every for name in one.dimensions}
        names = _measurable(job, asked, lambda name: name in there, still=self.filtered)
        prompts = every if self.subset is None else of_prompts.first_of(every, names, self.subset)
        wanted = {
            name: of_prompts.videos_of(prompts, self.videos, name, self.samples)
            for name in names
            if name != of_prompts.FLICKERING
        }
        check_job(job)
        if of_prompts.FLICKERING in names:
            wanted[of_prompts.FLICKERING] = (already_filtered if self.filtered else filter_videos)(
                job, prompts, self.videos
            )
        strays = of_prompts.unused(every, self.videos, self.samples)
        if strays:
            warn(f"{len(strays)} videos belong to no prompt, or lie beyond the samples, such as {strays[0]!r}")
        return {name: wanted[name] for name in names}


def _known(asked: Sequence[str]) -> list[str]:
    """Return dimensions by their official names.

    Raises:
        ConfigError: for unknown ones, and ones given twice.
    """
    from .dimensions import dimension

    names = [dimension(name).name for name in asked]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ConfigError(f"dimension {double} is given twice; leave one out")
    return names


def _measurable(job: "Job", asked: Sequence[str], usual: Callable[[str], bool], *, still: bool) -> list[str]:
    """Return the dimensions to measure: those asked for, or all usual ones that can be; tell which can't.

    Args:
        job: the run.
        asked: by name.
        usual: whether a dimension is measured without being asked for.
        still: whether temporal flickering needs no filter.

    Raises:
        ConfigError: where one that is asked for, or every one, can't be measured.
    """
    from .dimensions import DIMENSIONS
    from .measures import lacking
    from .prompts import FLICKERING
    from .run import no_filter

    names = _known(asked) or [name for name in DIMENSIONS if usual(name)]
    found = {name: lacking(name, job.means) for name in names}
    if FLICKERING in found and not still:
        found[FLICKERING] = no_filter(job)
    reasons = {name: reason for name, reason in found.items() if reason is not None}
    if reasons and (asked or len(reasons) == len(names)):
        raise ConfigError("; ".join(f"{name} can't be measured: {reason}" for name, reason in reasons.items()))
    for name, reason in reasons.items():
        warn(f"{name} is left out: {reason}")
    return [name for name in names if name not in reasons]


def _generate(
    videos: Path, asked: Sequence[str], full_info: Path | None, samples: int | None, subset: int | None, seed: int,
    shard: str | None, making: dict[str, Any],
) -> None:  # fmt: skip
    """Make the videos that a folder lacks; the cost is told before the model is loaded."""
    from dit_accel_pipelines.request import Request

    from . import generating, official
    from .dimensions import DIMENSIONS
    from .prompts import first_of, read_prompts

    every = read_prompts(official.prompts_path(full_info))
    there = {name for one in every for name in one.dimensions}
    names = _known(asked) or [name for name in DIMENSIONS if name in there]
    try:
        videos.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {videos} can't be made: {error.strerror}; name another") from None
    wanted = first_of(every, names, subset)
    work = generating.share(generating.pieces(every, wanted, names, videos, samples, seed), shard)
    request = Request(prompts=(work[0].prompt,), output=work[0].path, **making)
    left = generating.left(work, request)
    TALK.print(generating.cost(request, len(work) - len(left), len(work)), markup=False, soft_wrap=True)
    if left:
        tell = functools.partial(TALK.print, markup=False, soft_wrap=True)
        generating.generate(left, request, tell, sys.argv)
    TALK.print(f"{videos} is whole; measure it: dit-accel eval vbench --videos {videos}", markup=False, soft_wrap=True)


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
