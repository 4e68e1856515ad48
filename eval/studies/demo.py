"""The demo: a prompt dense, by a preset, and dense with the steps of as much time: `python eval/studies/demo.py`."""

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli import run_alone

MODEL = "wan-tiny"


def main(
    out: Annotated[Path, typer.Option(help="Folder for the files; made if missing.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="Name of an embedded model.")] = MODEL,
    prompt: Annotated[str | None, typer.Option(help="What to show; default: a choosing prompt, by rule.")] = None,
    seeds: Annotated[
        int, typer.Option(help="Seeds of the noise, from 0; the pictures show the one of median lead.", min=1, max=1000)
    ] = 6,
    num_frames: Annotated[int | None, typer.Option(help="Output frames; default: the model's own.")] = None,
) -> None:
    """Generate one prompt dense, by a preset, and dense in the same time; compare, and write the pictures."""
    from demo_comparison import make

    make(out, model, prompt, seeds, num_frames)


if __name__ == "__main__":
    run_alone(main)
