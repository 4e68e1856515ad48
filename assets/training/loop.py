"""The loop that all trainings run: seeded step by step, logged, within a budget, and resumed bit for bit.

Under `torchrun --nproc-per-node N` the transformer's training splits each batch over N processes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import Averages, Muon, split_parameters, trapezoid
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What every training's recipe says; each adds its own. A checkpoint goes on with its own recipe alone."""

    seed: int
    steps: int
    lr: float
    """Muon's learning rate; AdamW's is `adam_lr`."""
    adam_lr: float
    warmup: int
    decay: float
    """Share of the steps, at the end, over which the rates fall to zero."""
    ema: float
    """How much of the averaged weights stays at each step."""


Loss = tuple[Tensor, dict[str, float]]
"""A step's loss, and what of it to log, by name."""


def run_training(
    config: Recipe,
    modules: dict[str, nn.Module],
    loss_at: Callable[[int, np.random.Generator, Averages], Loss],
    *,
    run: Path,
    budget: Budget,
    change: bool,
    plain_names: tuple[str, ...],
    muon_dtype: torch.dtype,
    log_every: int,
) -> tuple[int, Averages, Log]:
    """Train until the recipe's steps are done or the budget ends, from the run's checkpoint where there is one.

    Args:
        config: the recipe.
        modules: name -> module whose weights are trained.
        loss_at: step, random numbers of that step, averages -> loss; torch's generator is seeded for the step too.
        run: folder of checkpoint and log.
        budget: when to stop and when to save.
        change: whether to go on from a checkpoint of another recipe.
        plain_names: parts of names of weights that AdamW takes in any case.
        muon_dtype: number format of Muon's iteration.
        log_every: steps a line of the log tells the mean of.

    Returns:
        The steps done, the averages and the log.
    """
    matrices, rest = split_parameters(modules.values(), plain_names=plain_names)
    optimizers = [
        Muon(matrices, lr=config.lr, dtype=muon_dtype),
        torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=0),
    ]
    averages, recipe = Averages(modules, config.ema), asdict(config)
    step, clock = restore(run / "checkpoint.pt", averages, optimizers, recipe, change)
    log, window = Log(run / "log.jsonl", **clock), defaultdict(list)
    rank, processes = process()
    log.write(event="start", step=step, threads=torch.get_num_threads(), processes=processes, config=recipe)
    while step < config.steps and all_of(budget.left()):
        torch.manual_seed((config.seed * 1_000_003 + step) * processes + rank)
        factor = trapezoid(step, config.steps, warmup=config.warmup, decay=config.decay)
        set_rates(optimizers, (config.lr, config.adam_lr), factor)
        loss, notes = loss_at(step, np.random.default_rng([config.seed, step, *[rank] * (rank > 0)]), averages)
        loss.backward()
        update(modules, optimizers)
        averages.update()
        step += 1
        for name, value in notes.items():
            window[name].append(value)
        if step % log_every == 0:
            log.write(step=step, **{name: float(np.mean(values)) for name, values in window.items()})
            window.clear()
        if budget.due():
            store(run / "checkpoint.pt", averages, optimizers, step, log, recipe)
    store(run / "checkpoint.pt", averages, optimizers, step, log, recipe)
    log.write(event="end" if step == config.steps else "pause", step=step)
    return step, averages, log


def update(modules: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
    """Take a step along the mean of all processes' gradients, clipped for each module."""
    average_gradients(modules)
    for module in modules.values():
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def process() -> tuple[int, int]:
    """Return this process's number, and how many processes train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_of(flag: bool) -> bool:
    """Return whether the flag is set on all processes; each gets the same answer."""
    if process()[1] == 1:
        return flag
    lowest = torch.tensor(int(flag))
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    return bool(lowest)


def average_gradients(modules: dict[str, nn.Module]) -> None:
    """Give every process the mean of all processes' gradients."""
    if (processes := process()[1]) == 1:
        return
    grads = [p.grad for module in modules.values() for p in module.parameters() if p.grad is not None]
    joined = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(joined)
    for grad, mean in zip(grads, (joined / processes).split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def read_arguments(description: str | None, recipe: type, run: Path, **paths: Path) -> argparse.Namespace:
    """Read the command line that all trainings share; `paths` become options of their own.

    The result holds `config` (the recipe with the changes requested), `budget`, `run`, `change` and the paths.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--run", type=Path, default=run, help="folder of checkpoint and log (default %(default)s)")
    for name, path in paths.items():
        parser.add_argument(f"--{name}", type=Path, default=path, help="default %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop, with a checkpoint, after this time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", type=json.loads, default={}, help='changes to the recipe as JSON, e.g. {"steps": 100}')
    parser.add_argument("--change", action="store_true", help="go on from a checkpoint of another recipe")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    args.config, args.budget = recipe(**args.set), Budget(args.minutes)
    signal.signal(signal.SIGTERM, lambda *_: args.budget.stop())
    return args


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load an optimizer's memory and keep its present settings."""
    settings = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": settings})


def store(
    path: Path, averages: Averages, optimizers: list[torch.optim.Optimizer], step: int, log: Log, recipe: dict[str, Any]
) -> None:
    """Save everything a training needs to go on, and the recipe that it must go on with, by the first process."""
    if process()[0]:
        return
    state = {key: module.state_dict() for key, module in averages.modules.items()}
    state |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers], "step": step, "clock": log.clocks()}
    save_atomic(state | {"averages": averages.values, "updates": averages.updates, "recipe": recipe}, path)


def restore(
    path: Path, averages: Averages, optimizers: list[torch.optim.Optimizer], recipe: dict[str, Any], change: bool
) -> tuple[int, dict[str, float]]:
    """Load what `store` saved, where there is a file; returns the steps done and the clocks.

    A checkpoint of another recipe is refused (ValueError naming what differs) unless `change` says to go on with this.
    """
    if not path.exists():
        return 0, {}
    state = torch.load(path, weights_only=False)
    saved = state["recipe"]
    differs = [f"{k}: {saved.get(k)!r} there, {recipe.get(k)!r} requested" for k in recipe if saved.get(k) != recipe[k]]
    if differs and not change:
        raise ValueError(
            f"{path} was made by another recipe ({'; '.join(differs)}); "
            "train with its recipe, into another --run, or go on with the new one by --change"
        )
    for key, module in averages.modules.items():
        module.load_state_dict(state[key])
    for optimizer, memory in zip(optimizers, state["optimizers"], strict=True):
        load_optimizer(optimizer, memory)
    averages.values, averages.updates = state["averages"], state["updates"]
    return state["step"], state["clock"]


def set_rates(optimizers: list[torch.optim.Optimizer], rates: tuple[float, ...], factor: float) -> None:
    """Set every optimizer's learning rate to its own rate times a common factor."""
    for optimizer, rate in zip(optimizers, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate * factor


class Budget:
    """The minutes one start of a training may take, and when its next checkpoint is due."""

    def __init__(self, minutes: float, every: float = 120.0) -> None:
        self.end, self.every = time.perf_counter() + 60 * minutes, every
        self.saved = time.perf_counter()

    def left(self) -> bool:
        """Say whether there is time for another step."""
        return time.perf_counter() < self.end

    def stop(self) -> None:
        """End after the present step, as a terminated training does, with a checkpoint."""
        self.end = 0.0

    def due(self) -> bool:
        """Say, once every `every` seconds, that a checkpoint is due."""
        if time.perf_counter() - self.saved < self.every:
            return False
        self.saved = time.perf_counter()
        return True


class Log:
    """A JSON-lines log that keeps wall and CPU seconds (of all processes) across restarts; the first process writes."""

    def __init__(self, path: Path, *, wall: float = 0.0, cpu: float = 0.0) -> None:
        self.path = path
        self.rank, self.processes = process()
        self.wall, self.cpu = wall - time.perf_counter(), cpu - self.processes * time.process_time()
        path.parent.mkdir(parents=True, exist_ok=True)

    def clocks(self) -> dict[str, float]:
        """Return the seconds spent so far in all runs of this training."""
        cpu = self.cpu + self.processes * time.process_time()
        return {"wall": round(self.wall + time.perf_counter(), 1), "cpu": round(cpu, 1)}

    def write(self, **values: Any) -> None:
        """Append one line."""
        if self.rank:
            return
        entry = {**{k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}, **self.clocks()}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def save_atomic(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a crash leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
