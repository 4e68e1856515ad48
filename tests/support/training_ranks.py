"""A training of one small layer, as one of the processes that share its batches."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "assets" / "training"))

import loop


@dataclass(frozen=True, kw_only=True, slots=True)
class Small(loop.Recipe):
    """A recipe of six steps."""

    seed: int = 3
    steps: int = 6
    lr: float = 1e-2
    adam_lr: float = 1e-2
    warmup: int = 2
    decay: float = 0.5
    ema: float = 0.9


class Steps(loop.Budget):
    """A budget that ends after a number of steps."""

    def __init__(self, count: int) -> None:
        super().__init__(60.0)
        self.count = count

    def left(self) -> bool:
        self.count -= 1
        return self.count >= 0


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the four inputs and outputs of a step."""
    drawn = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(step))
    return drawn[0], drawn[1]


def train(rank: int, world: int, folder: str, lasts: tuple[int, ...]) -> list[float]:
    """Train on this process's share of each batch, in parts that each process would end after `lasts[rank]` steps.

    Returns:
        The layer's weights.
    """
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8)

    def loss_at(step, rng, _averages):
        x, y = (each[rank::world] for each in batch(step))
        loss = (layer(x) - y).square().mean()
        return loss, {"loss": loss.item(), "drawn": float(rng.random())}

    while True:
        found = loop.run_training(
            Small(), {"layer": layer}, loss_at, run=Path(folder), budget=Steps(lasts[rank]), change=False,
            log_every=1, muon_dtype=torch.float32, plain_names=(),
        )  # fmt: skip
        if found[0] == Small().steps:
            return torch.cat([p.detach().flatten() for p in layer.parameters()]).tolist()
        torch.distributed.barrier()  # the first process's checkpoint is there


def told(folder: Path) -> list[dict]:
    """Return the lines of a training's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
