"""Where the denoising stands: at a forward of the transformer, and at one attention call inside it."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..adapters.noise import Noise, share_of_noise
from .heads import HeadShare
from .layout import TokenLayout

Key = tuple[str, int, str, int, int]
"""(transformer, layer, branch, row, batch): the attention calls that follow each other from step to step.

A cache may compute only a part of the batch at some steps (FasterCache does); what the whole batch learned stays.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """Where the denoising stands when a transformer runs."""

    transformer: str  # component name, ``transformer`` or ``transformer_2``
    branch: str  # name of the denoising call, such as ``cond``; that of a nested one is ``cond/name``
    step_index: int  # 0-based step of this run, over all experts
    num_inference_steps: int | None  # steps of this run; None where it is not known
    sigma: float | None  # noise level of the step, falling; None where it is not known
    # the sequence's token layout; None where it is not known yet, in a transformer that is compiled whole
    layout: TokenLayout | None
    batch: int | None  # rows of the forward; None where they are not known yet
    # the forward belongs to no generation, so its step means nothing: gradients are recorded in training mode, and no
    # pipeline tells a step
    training: bool = False
    tells_step: bool = False  # the pipeline's context states the step; else it is inferred from the timesteps
    # the branch whose forward of this step it runs beside, as a perturbed one beside the conditional: its attention
    # calls run as those did, and methods learn nothing from it. None: it is a forward of its own.
    beside: str | None = None
    rows: tuple[int, ...] | None = None  # which rows of that forward these are; None: all
    noise: Noise = "flow"  # what sigma is, as `dit_accel.adapters.noise` names it

    @property
    def values(self) -> dict[str, Any]:
        """Field -> value, from which the contexts of layers and blocks are made."""
        return {name: getattr(self, name) for name in StepContext.__slots__}

    @property
    def share_of_noise(self) -> float | None:
        """Share of noise in the latents, from 0 to 1, whatever sigma is; None where sigma is not known."""
        return None if self.sigma is None else share_of_noise(self.sigma, self.noise)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallContext(StepContext):
    """Where the denoising stands when an attention module runs; layout and batch are those of the call."""

    layout: TokenLayout
    batch: int
    layer: int  # index of the attention module among all that the adapter names, unique in its transformer
    depth: int  # index of its block, counted from the input; what ``dense_layers`` counts
    device: torch.device  # where q, k and v lie
    # which of the calls that the module makes in one forward; models that attend row by row make one per row
    row: int = 0
    # the forward ran this call before; gradient checkpointing does so, and must get the same again
    repeated: bool = False
    differentiate: bool = False  # a backward may follow, so that what the plan holds must not be written to
    # which of the layer's heads q, k and v are of, where processes share them; None: all are here
    heads: HeadShare | None = None
    # the layer is ``dense`` and methods choose its tiles anew, or these stay ``frozen`` as that call left them; None:
    # methods choose as in any call
    turn: Literal["dense", "frozen"] | None = None

    @property
    def key(self) -> Key:
        """Whose state the call reads and writes."""
        return self.transformer, self.layer, self.branch, self.row, self.batch
