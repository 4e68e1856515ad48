"""The options of the command `bench`, which times either a model's forwards or single attention calls."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from dit_accel_pipelines.generation.options import RUN, Device, Dtype, Json, Pixels

from dit_accel.errors import ConfigError, did_you_mean

CALLS = "Single attention calls"
SHAPES_HELP = (
    "Instead of a model's forwards, one self-attention call of each: all, or some of flux-1mp, flux-4mp, wan-480p, "
    "wan-720p, hunyuan-720p and FAMILY:HEIGHTxWIDTHxFRAMES."
)
OF_MODEL = ("family", "layers", "height", "width", "num_frames", "num_inference_steps", "native_caches")
OF_CALLS = ("heads", "budget", "limit")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """The options of the command `bench`; each is described by its help."""

    family: Annotated[str | None, typer.Option(help="A model family, such as wan2.1-1.3b.", metavar="NAME")] = None
    layers: Annotated[int, typer.Option(help="Blocks that are made.", min=1)] = 2
    height: Pixels = None
    width: Pixels = None
    num_frames: Annotated[int | None, typer.Option(help="Output frames.")] = None
    num_inference_steps: Annotated[int, typer.Option(help="Steps of a run.", min=2)] = 4
    rounds: Annotated[int, typer.Option(help="Runs of every arm, in turn; with --shapes at most.", min=1)] = 3
    native_caches: Annotated[bool, typer.Option(help="Time caches of diffusers too.")] = True
    shapes: Annotated[str | None, typer.Option(help=SHAPES_HELP, metavar="NAMES", rich_help_panel=CALLS)] = None
    heads: Annotated[int, typer.Option(help="Heads of each call.", min=1, rich_help_panel=CALLS)] = 2
    budget: Annotated[float, typer.Option(help="Seconds of all calls.", min=1, rich_help_panel=CALLS)] = 1500
    limit: Annotated[float, typer.Option(help="Seconds of all rounds of one call.", min=1, rich_help_panel=CALLS)] = 200
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", min=1)] = None
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON lines to append to.", metavar="FILE")] = (
        None
    )
    dtype: Dtype = None
    device: Device = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel=RUN)] = False
    json: Json = False

    def check(self, methods: Sequence[Any]) -> None:
        """Raise `ConfigError` for neither a family nor shapes, for options of the other one, or an unknown dtype."""
        from dit_accel_pipelines.generation.request import Dtype as DtypeName  # loads torch, which --help need not

        known = get_args(DtypeName)
        if self.dtype is not None and self.dtype not in known:
            raise ConfigError(f"no dtype is called {self.dtype!r}; {did_you_mean(self.dtype, known)}")
        if self.shapes is None and self.family is None:
            raise ConfigError(
                "bench needs --family NAME, such as wan2.1-1.3b, or --shapes all for attention calls alone"
            )
        if self.shapes is None and (given := self._given(OF_CALLS)):
            raise ConfigError(f"{given} is for attention calls alone; leave it out, or give --shapes and no --family")
        given = self._given(OF_MODEL) or ", ".join(f"--{one.name}" for one in methods)
        if self.shapes is not None and given:
            raise ConfigError(
                f"--shapes times attention calls alone, which take no {given}; leave it out, or give --family and no "
                "--shapes"
            )

    def _given(self, names: Sequence[str]) -> str:
        usual = {field.name: field.default for field in fields(self)}
        return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != usual[name])
