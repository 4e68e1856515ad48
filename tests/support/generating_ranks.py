"""What one of several processes runs to test how they generate together; here, so that a process finds it."""

from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.batch import numbered
from dit_accel_pipelines.generation.generate import generate
from dit_accel_pipelines.generation.media import read_image
from dit_accel_pipelines.generation.request import Request
from dit_accel_pipelines.processes.parallel import joined_group
from dit_accel_pipelines.processes.processes import Process, started_process
from parallel_ranks import told

import dit_accel

PROMPTS = ("a red circle", "a blue square", "a green triangle")


def requests(folder: Path, **changes: Any) -> list[Request]:
    methods = dit_accel.LiteAttention(block_size=16, dense_steps=0), dit_accel.EasyCache(threshold=9.0, warmup_steps=1)
    asked: dict[str, Any] = {"model": "flux-tiny", "num_inference_steps": 3, "methods": methods, **changes}
    return [
        Request(prompt=prompt, output=output, seed=seed, **asked)
        for seed, (prompt, output) in enumerate(zip(PROMPTS, numbered(folder / "a.png", len(PROMPTS)), strict=True))
    ]


def make(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Return what each process wrote, found kept and was refused; the first makes it alone as well, to compare."""
    lines: list[tuple[str, bool]] = []

    def note(one: Any) -> None:
        lines.append((Path(one.record["output"]).name, one.kept))

    refused = []
    for together, model in ((3, "flux-tiny"), (4, "flux-tiny"), (2, "wan-plain")):
        try:
            process = started_process(together=together)
            generate(requests(folder / "shared", model=model), process=process)
        except dit_accel.ConfigError as error:
            refused.append(told(error))
    process = started_process(together=2)
    with joined_group(process.local_rank, process.together):
        made = generate(requests(folder / "shared"), process=process, on_written=note)
        if rank == 0:
            (folder / "shared" / "a-03.png").unlink()
        again = generate(requests(folder / "shared"), process=process, resume=True, on_written=note)
    away = 0.0
    if rank == 0:
        generate(requests(folder / "alone"), process=Process())
        for path in (folder / "alone").glob("*.png"):
            one, other = (np.asarray(read_image(folder / where / path.name), float) for where in ("alone", "shared"))
            away = max(away, float(np.abs(one - other).max()))
    return {
        "lines": lines,
        "seeds": [one.record["seed"] for one in made],
        "kept": [one.kept for one in again],
        "refused": refused,
        "away": away,
    }
