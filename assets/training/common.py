"""What all trainings optimise with: Muon beside AdamW, the schedule and averaged weights."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RUNS = Path(os.environ.get("DIT_ACCEL_RUNS", Path(__file__).parent / "runs"))
"""Where checkpoints, latent pools and running logs live; not in version control."""


def last_checkpoint(run: Path) -> dict[str, Any]:
    """Return what a training's last checkpoint holds.

    Raises:
        FileNotFoundError: if it has written none.
    """
    path = run / "checkpoint.pt"
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; train first, or name the folder of another training")
    return torch.load(path, weights_only=False)


def packed_folder(path: Path, marker: str) -> Path:
    """Return the folder of packed weights, which holds a file of this name.

    Raises:
        FileNotFoundError: if it does not.
    """
    if not (path / marker).exists():
        raise FileNotFoundError(f"no packed weights in {path}, which lacks {marker}; name a folder that has it")
    return path


def fast_dtype() -> torch.dtype:
    """Return the number format that trains fastest here: bfloat16 where the processor multiplies it, else float32.

    Without such instructions bfloat16 takes three times as long; a run goes on bit for bit on processors of its kind.
    """
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def autocast() -> torch.autocast:
    """Return a context in which matrices are multiplied in `fast_dtype`."""
    return torch.autocast("cpu", fast_dtype(), enabled=fast_dtype() != torch.float32)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for weight matrices (Jordan et al. 2024, "Muon").

    Convolution kernels are flattened to [out, in * taps]; matrices of one shape go through the iteration together.
    Updates are scaled by 0.2 * sqrt(max(rows, columns)): learning rates of AdamW carry over (arXiv 2502.16982).
    """

    def __init__(self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, dtype: torch.dtype) -> None:
        super().__init__([{"params": list(params)}], {"lr": lr, "momentum": momentum, "dtype": dtype})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Apply one update; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(param)
                average = state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(average, group["momentum"]).reshape(param.shape[0], -1)
                shapes[tuple(update.shape)].append((param, update))
            for shape, members in shapes.items():
                updates = orthogonalize(torch.stack([update for _, update in members]).to(group["dtype"]))
                for (param, _), update in zip(members, updates, strict=True):
                    param.add_(update.view(param.shape).to(param.dtype), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of matrices [N, rows, columns] near 1 by Muon's quintic Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def split_parameters(
    modules: Iterable[nn.Module], plain_names: tuple[str, ...] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """Split weights into (Muon, AdamW): matrices and kernels with at least 8 rows and columns, against all the rest.

    A parameter whose name contains one of `plain_names` (embeddings, output layers) goes to AdamW in any case.
    """
    matrices, rest = [], []
    for module in modules:
        for name, param in module.named_parameters():
            is_matrix = param.ndim >= 2 and min(param.shape[0], param[0].numel()) >= 8
            (matrices if is_matrix and not any(part in name for part in plain_names) else rest).append(param)
    return matrices, rest


def trapezoid(step: int, total: int, *, warmup: int, decay: float) -> float:
    """Return the learning-rate factor: linear warm-up, flat, then linear to zero over the last `decay` share."""
    return max(0.0, min(1.0, (step + 1) / warmup, (total - step) / max(1.0, decay * total)))


class Averages:
    """Exponential moving averages of a set of modules' weights; young averages forget faster."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.modules, self.decay, self.updates = modules, decay, 0
        self.values = {key: {n: p.detach().clone() for n, p in m.named_parameters()} for key, m in modules.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for key, module in self.modules.items():
            values = self.values[key]
            names, params = zip(*module.named_parameters(), strict=True)
            torch._foreach_lerp_([values[name] for name in names], list(params), weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and present weights; call twice to be back."""
        for key, module in self.modules.items():
            for name, param in module.named_parameters():
                held = param.detach().clone()
                param.copy_(self.values[key][name])
                self.values[key][name] = held
