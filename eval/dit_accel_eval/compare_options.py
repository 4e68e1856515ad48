"""The options of `dit-accel eval compare`, and those that `eval folders` shares."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dit_accel_pipelines.generation import options as shared
from dit_accel_pipelines.generation.options import option

from dit_accel.cli.method_options import PANEL

FurtherMetrics = Annotated[list[str] | None, option("Repeatable; default: lpips@alex.", "--metric", "-m")]
KeepFrames = Annotated[bool, option("Keep all frames, so that the page can show clips.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions(shared.SharedOptions):
    """What `eval compare` is given besides methods."""

    model: shared.ModelBesideMetrics = None
    prompts: Annotated[Path | None, option("Text file, one prompt per line.", metavar="FILE")] = None
    prompt: Annotated[list[str] | None, option("A prompt instead; repeatable; default: held-out embedded ones.")] = None
    seed: Annotated[list[int] | None, option("A seed of every prompt; repeatable. Default: its place.")] = None
    clips: Annotated[int | None, option("Run only the first so many clips.", min=1)] = None
    steps: Annotated[int | None, option("Denoising steps; default: the model's.", min=1)] = None
    reference: Annotated[str, option("own: the model's steps; converged: many more.", metavar="own|converged")] = "own"
    output: Annotated[Path, option("Page to write.", "--output", "-o", metavar="FILE.html")] = Path("compare.html")
    metric: FurtherMetrics = None
    frames: KeepFrames = True
    preset: Annotated[
        list[str] | None,
        option("careful, balanced or fast: a setting of its own; may be repeated.", metavar="LEVEL", panel=PANEL),
    ] = None
    timed: Annotated[bool, option("Time each beside dense runs of its steps.", "--time", panel=shared.RUN)] = False
    quiet: shared.Quiet = False
