"""The command `dit-accel eval vbench`; what it needs is loaded when it runs."""

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from dit_accel_pipelines.generation.options import Json

from dit_accel import ConfigError
from dit_accel.cli import MethodList
from dit_accel.cli.console import OUT, TALK, plain_table, print_error, print_json, warn
from dit_accel.cli.stopping import keeps
from dit_accel.files import held

from . import options as given

if TYPE_CHECKING:
    from . import generating
    from .networks.loading import Networks
    from .prompts import Prompt
    from .protocols import Protocol

_tell = functools.partial(TALK.print, markup=False, soft_wrap=True)


def evaluate(
    totals: given.Totals = None, videos: given.Videos = None, dimension: given.Dimensions = None,
    full_info: given.FullInfo = None, samples: given.Samples = None, subset: given.Subset = None,
    filtered: given.Filtered = False, custom: given.Custom = False, prompts: given.Prompts = None,
    augmented: given.Augmented = None,
    long: given.Long = False, long_config: given.LongConfig = None, folder: given.Folder = None,
    observations: given.Observed = None, official: given.Official = None, output: given.Output = Path("vbench"),
    name: given.Name = None,
    reference: given.Reference = None, protocol: given.Convention = None,
    generate: given.Generate = False, model: given.Model = None, height: given.Pixels = None,
    width: given.Pixels = None, num_frames: given.Frames = None, num_inference_steps: given.Steps = None,
    guidance_scale: given.Guidance = None, fps: given.Fps = None, dtype: given.Dtype = None,
    offload: given.Offload = "none", seed: given.Seed = 0, shard: given.Shard = None, device: given.Device = None,
    json: Json = False, *, methods: MethodList,
) -> None:  # fmt: skip
    """Measure videos by VBench's sixteen dimensions, and give its totals where all are there.

    Scores are VBench's own or none: a dimension whose network is missing is
    named, with what to put where. Each video's score is kept as it is measured,
    so a run that was stopped goes on. The result files are laid out as VBench's.

    With --generate the videos are made: those of the dimensions' prompts, or of
    --prompts, that the folder lacks, each of another seed; what it costs is said
    first. With --reference they are held against dense ones as published tables
    were.

    Examples:

    dit-accel eval vbench --totals scores.json --json

    dit-accel eval vbench --videos out/ -d subject_consistency -d dynamic_degree

    dit-accel eval vbench --videos out/ --custom -d temporal_flickering --json

    dit-accel eval vbench --videos out/ --official vbench-env -d object_class

    dit-accel eval vbench --videos out/ --reference dense/ --protocol svg

    dit-accel eval vbench --videos out/ --generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --radial --subset 1
    """
    _refuse(locals())
    if videos is None:
        assert totals is not None
        return _print_totals(totals, json)
    chosen = Chosen(
        videos=videos, dimensions=tuple(dimension or ()), full_info=full_info, samples=samples, subset=subset,
        prompts=prompts, output=output, name=name or videos.resolve().name, folder=folder, device=device, json=json,
    )  # fmt: skip
    if official is not None:
        return _by_package(chosen, official, custom, filtered)
    if generate:
        making = {"model": model, "height": height, "width": width, "num_frames": num_frames, "fps": fps,
                  "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "dtype": dtype,
                  "device": device, "offload": offload, "methods": tuple(methods)}  # fmt: skip
        return _generate(chosen, seed, shard, protocol, augmented, making)
    if protocol is not None or reference is not None:
        return _compare(chosen, protocol, reference)
    return _measure(chosen, custom, filtered, observations, long, long_config)


_NOT_THE_PACKAGES = ("long", "long_config", "observations", "samples", "subset", "generate", "reference", "protocol")


def _refuse(options: Mapping[str, Any]) -> None:
    """Refuse options of `evaluate` that can't be asked for together, before anything is read."""
    asked = {name for name, value in options.items() if value not in (None, False, [])}
    if len(asked & {"totals", "videos"}) != 1:
        raise ConfigError("name either raw scores with --totals or a folder of videos with --videos")
    if "official" in asked:
        for name in (name for name in _NOT_THE_PACKAGES if name in asked):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"--official runs the vbench package as it is, which has no {option}; leave one out")
    if asked & {"long", "long_config"} and asked & {"generate", "protocol", "reference"}:
        raise ConfigError(
            "--long is for measuring dimensions; leave it out with --generate, --reference and --protocol"
        )
    if {"generate", "reference"} <= asked:
        raise ConfigError("--reference is for videos that are there; make them first, then compare")
    if "generate" not in asked and asked & {"methods", "model", "shard", "augmented"}:
        raise ConfigError("a model, its methods, shards and augmented prompts are for making videos; add --generate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What all ways of the command take; None: the way's own default."""

    videos: Path
    dimensions: tuple[str, ...]
    full_info: Path | None
    samples: int | None
    subset: int | None
    prompts: Path | None
    output: Path
    name: str
    folder: Path | None
    device: str | None
    json: bool

    def networks(self) -> "Networks":
        """Return the networks of the folder of weights."""
        from .networks.loading import Networks
        from .weight_files import default_folder

        return Networks(self.folder or default_folder(), self.device or "cpu")


def _measure(
    chosen: Chosen, custom: bool, filtered: bool, observations: Path | None, long: bool, long_config: Path | None
) -> None:
    """Measure videos by VBench's dimensions."""
    if chosen.prompts is not None and not custom:
        raise ConfigError("--prompts tells prompts of one's own; add --custom")
    if long_config is not None and not long:
        raise ConfigError("--long-config is for clips of long videos; add --long")
    from .long import Long, read_fast
    from .measures import Means
    from .observations import read_observations
    from .run import Job
    from .run import evaluate as measured
    from .source import Source

    networks, fast = chosen.networks(), None if long_config is None else read_fast(long_config)
    job = Job(
        name=chosen.name, output=chosen.output, warn=warn, tell=_tell,
        means=Means(networks=networks, observations=read_observations(observations)),
        long=Long(custom=custom, filtered=filtered, fast=fast) if long else None,
    )  # fmt: skip
    source = Source(
        videos=chosen.videos, custom=custom, prompts_file=chosen.prompts, full_info=chosen.full_info,
        samples=chosen.samples or 5, filtered=filtered, subset=chosen.subset,
    )  # fmt: skip
    wanted = source.wanted(job, chosen.dimensions)
    keeps(f"what was measured stands in {job.lines}, and the same command goes on there")
    with held(job.lines, "the results file"):
        found = measured(job, wanted)
    whole = chosen.samples in (None, 5) and chosen.subset is None and not custom and not long
    _print_scores(found, job.results, whole=whole, json=chosen.json)


def _by_package(chosen: Chosen, environment: Path, custom: bool, filtered: bool) -> None:
    """Measure videos by the official package, in an environment of its own."""
    from .dimensions import DIMENSIONS
    from .package_run import PackageRun, measure
    from .prompts import ASKED
    from .source import known_names

    job = PackageRun(
        environment=environment, videos=chosen.videos, output=chosen.output, name=chosen.name, custom=custom,
        prompts_file=chosen.prompts, full_info=chosen.full_info, filtered=filtered, weights=chosen.folder,
        device=chosen.device or "cuda", tell=_tell, warn=warn,
    )  # fmt: skip
    usual = [name for name in DIMENSIONS if not (custom and name in ASKED)]
    keeps(f"each dimension's results stand in {chosen.output}, and the same command goes on with the next")
    found = measure(job, known_names(chosen.dimensions) or usual)
    _print_scores(found, job.results, whole=not custom, json=chosen.json)


def _compare(chosen: Chosen, protocol: str | None, reference: Path | None) -> None:
    """Hold videos against a reference as a published code base does."""
    from .protocols import PROTOCOLS
    from .protocols import protocol as protocol_of

    if protocol is None or reference is None:
        missing = "--protocol, one of " + ", ".join(PROTOCOLS) if protocol is None else "--reference, the dense clips"
        raise ConfigError(f"a comparison takes a reference and a protocol; add {missing}")
    if chosen.dimensions:
        raise ConfigError(f"{chosen.dimensions[0]} is measured without a reference; leave --protocol or -d out")
    from .protocol_run import Comparison, compare, rows

    job = Comparison(
        protocol=protocol_of(protocol), videos=chosen.videos, reference=reference, output=chosen.output,
        name=chosen.name, networks=chosen.networks(), warn=warn, tell=_tell,
    )  # fmt: skip
    found = compare(job)
    if chosen.json:
        print_json({key: value for key, value in found.items() if key != "by_clip"} | {"result": str(job.result)})
        return
    by = f"by {job.protocol.name}"
    table = plain_table("", by, "beside it", right=(by, "beside it"))
    for row in rows(found):
        table.add_row(*row)
    OUT.print(table)
    for flaw in found["flaws"]:
        OUT.print(f"of {job.protocol.name}: {flaw}", markup=False, soft_wrap=True)
    _tell(f"written to {job.result}")


def _generate(
    chosen: Chosen, seed: int, shard: str | None, protocol: str | None, augmented: Path | None, making: dict[str, Any]
) -> None:
    """Make the videos that a folder lacks; the cost is printed before the model is loaded."""
    from dit_accel_pipelines.generation.request import Request

    from . import generating
    from .protocols import protocol as protocol_of

    convention = None if protocol is None else protocol_of(protocol)
    if convention is not None:
        making = generating.sized(convention, making, _tell)
    try:
        chosen.videos.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {chosen.videos} can't be made: {error.strerror}; name another") from None
    work = generating.share(_pieces(chosen, convention, augmented, seed), shard)
    request = Request(prompts=(work[0].prompt,), output=work[0].path, **making)
    left = generating.remaining(work, request)
    _tell(generating.cost(request, len(work) - len(left), len(work)))
    if left:
        keeps(f"the videos in {chosen.videos} are whole, and the same command makes those that lack")
        generating.generate(left, request, _tell, sys.argv)
    then = " --custom" if chosen.prompts is not None else ""
    then = then if convention is None else f" --reference DENSE --protocol {convention.name}"
    _tell(f"{chosen.videos} is whole; measure it: dit-accel eval vbench --videos {chosen.videos}{then}")


def _pieces(
    chosen: Chosen, convention: "Protocol | None", augmented: Path | None, seed: int
) -> "Sequence[generating.Piece]":
    """Return the videos to be made: of VBench's prompts, augmented or not, of a protocol's, or of one's own."""
    from . import generating

    if augmented is not None and (convention is not None or chosen.prompts is not None):
        other = "--prompts" if convention is None else "--protocol"
        raise ConfigError(f"--augmented words VBench's own prompts, so that they can't be another's; leave {other} out")
    if convention is not None:
        texts = _texts(chosen, convention)
        return generating.protocol_pieces(convention, texts, chosen.videos, chosen.samples, seed)
    if chosen.prompts is not None:
        texts = generating.read_texts(chosen.prompts, "--prompts")[: chosen.subset]
        return generating.own_pieces(texts, chosen.videos, chosen.samples, seed)
    every, wanted, names = _official(chosen)
    worded = () if augmented is None else generating.read_augmented(augmented, every)
    return generating.pieces(every, wanted, names, chosen.videos, chosen.samples, seed, worded)


def _official(chosen: Chosen) -> "tuple[list[Prompt], list[Prompt], list[str]]":
    """Return VBench's prompts, those that are wanted, and the dimensions asked for, else all that there are."""
    from . import official
    from .dimensions import DIMENSIONS
    from .prompts import first_of, read_prompts
    from .source import known_names

    every = read_prompts(official.prompts_path(chosen.full_info))
    there = {name for one in every for name in one.dimensions}
    names = known_names(chosen.dimensions) or [name for name in DIMENSIONS if name in there]
    return every, first_of(every, names, chosen.subset), names


def _texts(chosen: Chosen, protocol: "Protocol") -> Sequence[str]:
    """Return a protocol's prompts: of a file, a line each, or VBench's."""
    from .generating import read_texts

    if chosen.prompts is not None:
        return read_texts(chosen.prompts, "--prompts")[: chosen.subset]
    if not protocol.own_prompts:
        raise ConfigError(
            f"the prompts of protocol {protocol.name} are {protocol.prompts}, which are not here; give them with "
            "--prompts FILE, one a line"
        )
    return [one.text for one in _official(chosen)[1]]


def _print_scores(found: dict[str, list[Any]], results: Path, *, whole: bool, json: bool) -> None:
    from .dimensions import DIMENSIONS
    from .totals import totals

    scores = {name: held[0] for name, held in found.items()}
    sums = asdict(totals(scores)) if whole and len(scores) == len(DIMENSIONS) else None
    if json:
        print_json({"scores": scores, "totals": sums, "results": str(results)})
        return
    table = plain_table("dimension", "score", "videos", right=("score", "videos"))
    for name, (score, entries) in found.items():
        table.add_row(name, f"{score:.4f}", str(len(entries)))
    OUT.print(table)
    if sums is not None:
        OUT.print("  ".join(f"{name.title()} {100 * sums[name]:.2f}" for name in ("quality", "semantic", "total")))
    _tell(f"written to {results}")


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
    """Unpack VBench's package, fetch what is on the hub where asked, and print what is missing, where, with its hash.

    Raises:
        typer.Exit: with code 1 where something is missing or another.
    """
    from . import official
    from .weight_files import WEIGHT_FILES, default_folder, from_hub, state

    at = folder or default_folder()
    package = official.unpack(archives, _tell)
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
