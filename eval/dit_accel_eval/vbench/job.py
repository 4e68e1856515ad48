"""What `dit-accel eval vbench` is given, and the files that it leaves."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dit_accel_pipelines.generation.options import Json, SharedOptions, option

from dit_accel import ConfigError
from dit_accel.cli.console import TALK
from dit_accel.cli.run_options import InferenceSteps
from dit_accel.files import check_writable, make_folder, write_json

from .dimensions import dimension

tell = functools.partial(TALK.print, markup=False, soft_wrap=True)
VIDEOS, MAKING = "Videos", "Making videos"
_EACH = "May be repeated. Default: all that can be measured."
_OWN = "JSON {file name: prompt}; default: the files' names. With --generate: a prompt a line."
_BY = "Measure by the vbench package itself, in this virtual environment, made if missing."
_WORDED = "VBench's prompts in other words, a line each, as the model is to get them; seeds 100000 i + j."


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoJob(SharedOptions):
    """The options of the command; each is described by its help."""

    totals: Annotated[Path | None, option("JSON of all sixteen raw scores, to total.", metavar="SCORES.json")] = None
    name: Annotated[str | None, option("What result files begin with; default: the videos' folder.")] = None
    videos: Annotated[Path | None, option("Folder of videos {prompt}-{i}.mp4.", panel=VIDEOS, metavar="DIR")] = None
    dimension: Annotated[list[str] | None, option(_EACH, "--dimension", "-d", panel=VIDEOS)] = None
    full_info: Annotated[Path | None, option("Official prompts; default: the vbench package's.", panel=VIDEOS)] = None
    samples: Annotated[int | None, option("Videos of each prompt; default: 5.", panel=VIDEOS, min=1)] = None
    subset: Annotated[int | None, option("Only the first prompts of each dimension.", panel=VIDEOS, min=1)] = None
    filtered: Annotated[bool, option("Those of flickering passed its filter.", "--filtered", panel=VIDEOS)] = False
    custom: Annotated[bool, option("Any videos, of prompts of one's own.", "--custom", panel=VIDEOS)] = False
    prompts: Annotated[Path | None, option(_OWN, panel=VIDEOS, metavar="FILE")] = None
    official: Annotated[Path | None, option(_BY, panel=VIDEOS, metavar="ENV")] = None
    folder: Annotated[Path | None, option("The package's weights; default: its own folder.", panel=VIDEOS)] = None
    output: Annotated[Path, option("Folder of the results.", "--output", "-o", panel=VIDEOS)] = Path("vbench")
    generate: Annotated[bool, option("Make the videos instead of measuring.", "--generate", panel=MAKING)] = False
    augmented: Annotated[Path | None, option(_WORDED, panel=MAKING, metavar="FILE")] = None
    model: Annotated[str | None, option("Hub id, folder or embedded model.", panel=MAKING)] = None
    num_inference_steps: InferenceSteps = None
    fps: Annotated[float | None, option("Frames per second; default: as generate.", panel=MAKING)] = None
    seed: Annotated[int, option("Of the first prompt's first video.", panel=MAKING)] = 0
    shard: Annotated[str | None, option("The i-th of n shares, i from 0.", panel=MAKING, metavar="i/n")] = None
    json: Json = False

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions that are named, by their official names; refuses unknown ones, and ones given twice."""
        names = [dimension(name).name for name in self.dimension or ()]
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise ConfigError(f"dimension {double} is given twice; leave one out")
        return tuple(names)

    @property
    def clips(self) -> Path:
        """The folder of videos, without which nothing but totals can be had."""
        assert self.videos is not None
        return self.videos

    def file(self, what: str) -> Path:
        """Return a file of the results."""
        return self.output / f"{self.name or self.clips.resolve().name}_{what}"

    def check_files(self, *files: str) -> None:
        """Make the folder of results, and refuse files there that can't be written, before anything is measured."""
        make_folder(self.output, "output")
        for what in files:
            check_writable(self.file(what), "results")

    def write(self, what: str, held: Any) -> None:
        """Write a file of the results as JSON, whole or not at all."""
        write_json(self.file(what), held)
