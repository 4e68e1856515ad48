"""LoRAs for longer clips: `python eval/studies/finetuned.py eval/finetuning/finetuned-wan-plain.toml`.

Trains a LoRA dense and through sparse attention, in turns of some steps each, so that their seconds are of the same
minutes; then judges held-out clips of every arm as `longer` does. A run that was stopped goes on.
"""

import argparse
import json
import statistics
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dit_accel_assets import model_defaults, model_score
from dit_accel_eval.metrics.loops import loop
from dit_accel_eval.metrics.motion import motion
from dit_accel_eval.metrics.sharpness import sharpness
from dit_accel_eval.runs.loaded import EmbeddedModel, weights_hash
from dit_accel_eval.runs.results import Line, append_line, latest, markdown_table, read_lines, write_lines
from dit_accel_eval.suites.job import check_lines
from dit_accel_pipelines.finetuning.checkpoint import latest_checkpoint
from dit_accel_pipelines.finetuning.recipe import FineTuning
from dit_accel_pipelines.finetuning.run import finetune
from dit_accel_pipelines.generation.lora import load_lora
from dit_accel_pipelines.generation.media import contact_sheet, to_uint8
from dit_accel_pipelines.generation.solvers import BEST
from judging import paired_cell

from dit_accel import ConfigError, DitAccelError
from dit_accel.errors import did_you_mean
from dit_accel.files import written_whole
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.registry import method

VERSION = 1
TURN = 20
"""Steps of one training before the next has its turn."""

KEYS = ("name", "model", "clips", "num_inference_steps", "num_frames", "training", "trainings", "arm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One arm: what is attached and loaded while its clips are made.

    Attributes:
        name: the row's name.
        num_frames: output frames.
        lora: name of the training whose LoRA is loaded; None: none is.
        methods: what is attached.
    """

    name: str
    num_frames: int
    lora: str | None
    methods: tuple[MethodConfig, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the arm without its name, as JSON knows it."""
        methods = {one.name: one.to_dict() for one in self.methods}
        return {"num_frames": self.num_frames, "lora": self.lora, "methods": methods}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """Trainings of one recipe with different methods, and the arms that are judged.

    Attributes:
        name: of the results' file.
        model: name of the embedded model.
        clips: held-out clips, seeds 0 .. clips - 1.
        num_inference_steps: denoising steps.
        num_frames: frames of the clips that are trained on.
        training: fields of `FineTuning` that all trainings share.
        trainings: name -> methods attached in training.
        arms: what is judged.
    """

    name: str
    model: str
    clips: int
    num_inference_steps: int
    num_frames: int
    training: Mapping[str, Any] = field(default_factory=dict)
    trainings: Mapping[str, tuple[MethodConfig, ...]] = field(default_factory=dict)
    arms: tuple[Judged, ...] = ()

    def recipe(self, name: str, work: Path, **changes: Any) -> FineTuning:
        """Return the recipe of one training, with its files below a folder."""
        values: dict[str, Any] = {
            "model": self.model, "num_frames": self.num_frames, "methods": self.trainings[name], "device": "cpu",
            "output": work / name, "cache": work / "cache", **self.training,
        }  # fmt: skip
        return FineTuning(**{**values, **changes})


def read_experiment(path: Path) -> Experiment:
    """Read an experiment from a TOML file.

    Raises:
        ConfigError: for a file that is missing or of another version, or a key that is missing or unknown.
    """
    if not path.is_file():
        raise ConfigError(f"no experiment at {path}; name a TOML file such as eval/finetuning/finetuned-wan-plain.toml")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    if data.pop("version", None) != VERSION:
        raise ConfigError(f"{path} is not of version {VERSION}, which this release reads; rewrite it for that")
    for key in data:
        if key not in KEYS:
            raise ConfigError(f"{path} has an unknown key {key!r}; {did_you_mean(key, KEYS)}")
    missing = [key for key in KEYS if key not in data]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}; add what is missing")
    trainings = {name: _methods(table) for name, table in data.pop("trainings").items()}
    arms = tuple(_arm(table, data["num_frames"], trainings, path) for table in data.pop("arm"))
    return Experiment(**data, trainings=trainings, arms=arms)


def run(experiment: Experiment, out: Path, work: Path) -> None:
    """Train what is not trained, judge what is not judged, and append one JSON line for each.

    Args:
        experiment: what to run.
        out: the results' file.
        work: folder of LoRAs, checkpoints and encoded clips.

    Raises:
        ConfigError: if the results are of another model, training or arm.
    """
    lines = read_lines(out)
    setting = {"model": experiment.model, "weights": weights_hash(experiment.model)}
    check_lines(out, lines, setting, {arm.name: _about(experiment, arm) for arm in experiment.arms})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(out, lines)  # without a last line that was cut off
    trained = {line["arm"] for line in lines if "log" in line}
    if any(_training(name) not in trained for name in experiment.trainings):
        for line in train(experiment, work):
            if line["arm"] not in trained:
                append_line(out, {**setting, **line})
    done = latest([line for line in lines if "clip" in line])
    model = EmbeddedModel(experiment.model, {})
    for arm in experiment.arms:
        _judge(experiment, arm, model, [c for c in range(experiment.clips) if (arm.name, c) not in done], out, work)


def train(experiment: Experiment, work: Path) -> Iterator[Line]:
    """Train every LoRA, in turns, from where an earlier run stopped; give a line of each when all are trained."""
    steps, records = int(experiment.training["steps"]), {}
    for end in [*range(TURN, steps, TURN), steps]:
        for name in experiment.trainings:
            found = latest_checkpoint(work / name)
            if found is not None and int(found.stem.partition("-")[2]) >= end and end < steps:
                continue
            made = finetune(experiment.recipe(name, work, steps=end, resume=found is not None))
            records[name] = made.record
            print(f"{name}: {end} of {steps} steps", file=sys.stderr)
    for name, record in records.items():
        log = [json.loads(line) for line in (work / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        kept = {key: value for key, value in record.items() if key not in ("command", "seconds_a_step", "model")}
        yield {"arm": _training(name), "training": kept, "log": log}


def _judge(
    experiment: Experiment, arm: Judged, model: EmbeddedModel, clips: Sequence[int], out: Path, work: Path
) -> None:
    """Make and judge an arm's clips."""
    if not clips:
        return
    if arm.lora is not None:
        load_lora(model.pipe, str(work / arm.lora))
    trained, frames = int(model_defaults(experiment.model)["num_frames"]), []
    for clip in clips:
        made = model.run(
            clip, steps=experiment.num_inference_steps, solver=BEST, methods=arm.methods,
            call={"num_frames": arm.num_frames},
        )  # fmt: skip
        frames.append(to_uint8(made.frames))
        append_line(out, {
            "arm": arm.name, "clip": clip, "prompt": model.prompt(clip), "model": experiment.model,
            "weights": model.weights, **_about(experiment, arm), "frames": len(made.frames),
            "score": model_score(model.name, clip, made.frames), "motion": motion(made.frames),
            "sharpness": sharpness(made.frames), "loop": loop(made.frames, trained), "attended": made.attended,
            "torch": torch.__version__,
        })  # fmt: skip
        print(f"{arm.name}: clip {clip}", file=sys.stderr)
    if arm.lora is not None:
        model.pipe.unload_lora_weights()
    with written_whole(work / f"{arm.name}.png") as temporary:
        contact_sheet(frames, [model.prompt(clip) for clip in clips]).save(temporary)


def table(experiment: Experiment, lines: Sequence[Line]) -> str:
    """Return the Markdown tables: the trainings, then the arms, each against the longer clips as they are."""
    trained = "training | steps | density | loss, first and last quarter | seconds a step | times dense"
    plain = next(arm.name for arm in experiment.arms if _is_plain(experiment, arm))
    judged = "arm | clips | frames | score | motion x 1000 | sharpness x 1000 | loop | pairs computed"
    judged += f" | paired difference to {plain}, points of the score | of the loop"
    rows = markdown_table(judged, _arms(experiment, lines, plain))
    return f"{markdown_table(trained, _trainings(experiment, lines))}\n\n{rows}"


def _trainings(experiment: Experiment, lines: Sequence[Line]) -> Iterator[Sequence[object]]:
    """Give the rows of the trainings; seconds are medians over the log, ratios those of the same turns."""
    by_name = {line["arm"]: line for line in lines if "log" in line}
    first: list[float] = []
    for name in experiment.trainings:
        line = by_name.get(_training(name))
        if line is None:
            continue
        log = line["log"]
        seconds, part = [entry["seconds_a_step"] for entry in log], max(1, len(log) // 4)
        first = first or seconds
        ratio = statistics.median(a / b for a, b in zip(seconds, first, strict=True))
        losses = [float(np.mean([entry["loss"] for entry in some])) for some in (log[:part], log[-part:])]
        yield (
            name, log[-1]["step"], f"{log[-1]['density']:.2f}", f"{losses[0]:.3f}, {losses[1]:.3f}",
            f"{statistics.median(seconds):.2f}", f"{ratio:.2f}",
        )  # fmt: skip


def _arms(experiment: Experiment, lines: Sequence[Line], plain: str) -> Iterator[Sequence[object]]:
    """Give the rows of the arms."""
    by_arm = {
        arm.name: {line["clip"]: line for line in lines if line["arm"] == arm.name and "clip" in line}
        for arm in experiment.arms
    }
    longer = {arm.name for arm in experiment.arms if arm.num_frames == experiment.num_frames}
    for name, clips in by_arm.items():
        if not clips:
            continue
        keys = ("frames", "score", "motion", "sharpness", "loop", "attended")
        mean = {key: float(np.mean([line[key] for line in clips.values()])) for key in keys}
        others = by_arm[plain] if name in longer - {plain} else {}
        yield (
            name, len(clips), f"{mean['frames']:.0f}", f"{mean['score']:.0%}", f"{1000 * mean['motion']:.2f}",
            f"{1000 * mean['sharpness']:.2f}", f"{mean['loop']:.2f}", f"{mean['attended']:.0%}",
            paired_cell(clips, others, "score", scale=100), paired_cell(clips, others, "loop"),
        )  # fmt: skip


def page_text(root: Path, name: str) -> str:
    """Return what the page says of a committed run: how to repeat it, and its tables.

    Args:
        root: the project's root folder.
        name: the experiment's.
    """
    path = Path(f"eval/finetuning/{name}.toml")
    experiment = read_experiment(root / path)
    lines, command = (
        read_lines(root / f"eval/results/{experiment.name}.jsonl"),
        f"python eval/studies/finetuned.py {path}",
    )
    if not lines:
        return f"Not measured yet; `{command}` measures it on {experiment.model}."
    recipe = ", ".join(f"{name} {value}" for name, value in experiment.training.items())
    return (
        f"`{command}`: {experiment.model}, one thread; each training {recipe}, {experiment.num_frames} frames; judged "
        f"on {experiment.clips} held-out prompts and seeds, {experiment.num_inference_steps} UniPC steps; 95 % "
        "intervals."
        f"\n\n{table(experiment, lines)}"
    )


def _is_plain(experiment: Experiment, arm: Judged) -> bool:
    return arm.lora is None and not arm.methods and arm.num_frames == experiment.num_frames


def _training(name: str) -> str:
    """Return what stands in a training's line in place of an arm's name."""
    return f"training {name}"


def _about(experiment: Experiment, arm: Judged) -> Line:
    """Return what an arm's line must say, its training's recipe included."""
    recipe: dict[str, Any] = {}
    if arm.lora is not None:
        methods = {one.name: one.to_dict() for one in experiment.trainings[arm.lora]}
        recipe = {**experiment.training, "methods": methods, "num_frames": experiment.num_frames}
    return {**arm.to_dict(), "num_inference_steps": experiment.num_inference_steps, "recipe": recipe}


def _arm(values: dict[str, Any], frames: int, trainings: Mapping[str, Any], path: Path) -> Judged:
    name, lora = values.pop("name", None), values.pop("lora", None)
    if not isinstance(name, str):
        raise ConfigError(f"{path} has an arm without a name: {values}; give it one")
    if lora is not None and lora not in trainings:
        raise ConfigError(f"{path}: arm {name!r} has no training {lora!r}; {did_you_mean(lora, trainings)}")
    frames = values.pop("num_frames", frames)
    return Judged(name=name, num_frames=frames, lora=lora, methods=_methods(values))


def _methods(tables: Mapping[str, Any]) -> tuple[MethodConfig, ...]:
    return tuple(method(key)(**value) for key, value in tables.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment, or only print the tables of what has run; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--out", type=Path, help="JSON lines; default: eval/results/<name>.jsonl")
    parser.add_argument("--work", type=Path, default=Path("finetuned"), help="LoRAs and checkpoints (%(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the tables of an earlier run, train nothing")
    options = parser.parse_args(arguments)
    try:
        experiment = read_experiment(options.experiment)
        out = options.out or options.experiment.parent.parent / "results" / f"{experiment.name}.jsonl"
        if not options.table:
            torch.set_num_threads(options.threads)
            run(experiment, out, options.work)
        print(table(experiment, read_lines(out)))
    except DitAccelError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
