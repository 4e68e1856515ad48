"""The loop: loss, backward through the attached methods, AdamW, averaged weights, checkpoints."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import dit_accel
from dit_accel.errors import ConfigError
from dit_accel.files import write_text
from dit_accel.methods.base import Place
from dit_accel.methods.registry import handler_of

from ..generation.progress import Stages
from ..processes.ranks import Ranks
from .checkpoint import Checkpoint
from .encoded import Encoded
from .experts import span_of
from .flow import batch_loss, batch_of
from .recipe import FineTuning
from .trainable import Trainable, shift_at

LOG = "log.jsonl"
LOG_EVERY = 10
"""Steps that a line of the log tells the mean of."""


class Trainer:
    """One process of a training."""

    def __init__(
        self, pipe: Any, transformer: Any, weights: Mapping[str, nn.Parameter], encoded: Encoded,
        trainable: Trainable, recipe: FineTuning, ranks: Ranks, accelerator: Any,
    ) -> None:  # fmt: skip
        from diffusers.training_utils import EMAModel

        self.pipe, self.transformer, self.weights, self.encoded = pipe, transformer, dict(weights), encoded
        self.recipe, self._trainable, self._ranks, self._accelerator = recipe, trainable, ranks, accelerator
        self._optimizer = torch.optim.AdamW(self.parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self._averages = EMAModel(self.parameters, decay=recipe.ema_decay) if recipe.ema_decay else None
        tokens = encoded.latents(0)[0].numel()
        self._shift = shift_at(pipe.scheduler, tokens) if recipe.flow_shift is None else recipe.flow_shift
        self._span = span_of(pipe, recipe.expert)
        self._group, self._groups = ranks.rank // recipe.ulysses, ranks.count // recipe.ulysses
        self._dtype = getattr(torch, str(recipe.dtype))
        self.step = 0
        self.seconds: list[float] = []
        self.density: float | None = None
        self._lines: list[dict[str, Any]] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return list(self.weights.values())

    def train(self, attachment: Any, stages: Stages) -> Iterator[int]:
        """Train to the recipe's last step; gives the number of steps done after each."""
        stages.stage("training", self.recipe.steps, self.step)
        self.transformer.train()
        window: list[Tensor] = []
        while self.step < self.recipe.steps:
            began = time.perf_counter()
            loss, norm = self._one_step(attachment)
            self.step += 1
            self.seconds.append(time.perf_counter() - began)
            window.append(loss)
            if self.step % LOG_EVERY == 0 or self.step == self.recipe.steps:
                self._log(window, float(norm))
                window = []
            stages.advance()
            yield self.step

    def checkpoint(self, identity: Mapping[str, Any]) -> Checkpoint:
        """Return all that a training goes on from."""
        return Checkpoint(
            step=self.step,
            identity=identity,
            weights={name: weight.detach().cpu() for name, weight in self.weights.items()},
            averages=self._averages.state_dict() if self._averages else None,
            optimizer=self._optimizer.state_dict(),
        )

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Take up a training where a checkpoint left it."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(checkpoint.weights[name])
        if self._averages is not None:
            self._averages.load_state_dict(dict(checkpoint.averages or {}))
            self._averages.to(self.parameters[0].device)
        self._optimizer.load_state_dict(dict(checkpoint.optimizer))
        self.step = checkpoint.step

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the transformer have the averaged weights inside the block, and run as in generation."""
        transformer, averages = self.transformer, self._averages
        transformer.eval()
        if averages is not None:
            averages.store(self.parameters)
            averages.copy_to(self.parameters)
        try:
            yield
        finally:
            if averages is not None:
                averages.restore(self.parameters)
            transformer.train()

    def _one_step(self, attachment: Any) -> tuple[Tensor, Tensor]:
        """Do one optimizer step; return the mean loss of its clips, and its gradient's length before the cut."""
        recipe, loss = self.recipe, torch.zeros(())
        for turn in range(recipe.accumulate):
            batch = batch_of(self._numbers(turn), self.encoded, recipe, self._shift, self._span)
            place = self.parameters[0].device
            batch_mean = batch_loss(self.transformer, self.pipe, self._trainable, batch, place, self._dtype)
            if self.density is None:
                self._look(attachment)
            (batch_mean / recipe.accumulate).backward()
            loss = loss + batch_mean.detach().cpu() / recipe.accumulate
        self._add_up_gradients()
        norm = nn.utils.clip_grad_norm_(self.parameters, recipe.max_grad_norm)
        if not torch.isfinite(norm):
            raise ConfigError(
                f"the gradient of step {self.step + 1} is not finite; train with a smaller learning rate, or float32"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = rate_at(self.step, recipe)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._averages is not None:
            self._averages.step(self.parameters)
        return loss, norm

    def _numbers(self, turn: int) -> range:
        """Return the places of the training that this process's group has in one forward of this step."""
        recipe = self.recipe
        first = ((self.step * recipe.accumulate + turn) * self._groups + self._group) * recipe.batch_size
        return range(first, first + recipe.batch_size)

    def _add_up_gradients(self) -> None:
        """Let every process have the mean of the groups' gradients; within a group, which shares a clip, their sum."""
        if self._ranks.count == 1:
            return
        gradients = [weight.grad for weight in self.parameters if weight.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        flat = self._accelerator.reduce(flat, "sum") / self._groups
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _look(self, attachment: Any) -> None:
        """Note how dense attention is in the first forward, and refuse methods that leave it as it is in training."""
        report: dit_accel.Report | None = attachment.report() if attachment is not None else None
        self.density = 1.0 if report is None else report.density
        names = [method.name for method in self.recipe.methods if Place.ATTENTION in handler_of(method).places]
        if names and report is not None and report.sparse_density is None:
            raise ConfigError(
                f"{', '.join(names)} leaves every attention call dense in training, so that nothing would be trained "
                "for; leave it out here and attach it afterwards"
            )

    def _log(self, window: list[Tensor], norm: float) -> None:
        """Append a line to the log, and tell the tracker."""
        loss = torch.stack(window).mean().to(self.parameters[0].device)
        if self._ranks.count > 1:  # of a group all have the same
            loss = self._accelerator.reduce(loss, "mean")
        line = {
            "step": self.step,
            "loss": float(loss),
            "gradient_norm": norm,
            "learning_rate": rate_at(self.step - 1, self.recipe),
            "seconds_a_step": sum(self.seconds[-len(window) :]) / len(window),
            "density": self.density,
        }
        self._accelerator.log({name: value for name, value in line.items() if name != "step"}, step=self.step)
        if self._ranks.first:
            with (self.recipe.output / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")

    def cut_log(self) -> None:
        """Leave in the log what this training has done so far; nothing of one that has no checkpoint."""
        path = self.recipe.output / LOG
        if not path.exists():
            return
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        lines = [line for line in whole if json.loads(line)["step"] <= self.step]
        write_text(path, "".join(f"{line}\n" for line in lines))


def rate_at(step: int, recipe: FineTuning) -> float:
    """Return the learning rate of a step (0-based): it rises linearly over the warm-up, and is held then."""
    return recipe.learning_rate * min(1.0, (step + 1) / max(1, recipe.warmup_steps))
