"""Cards that `plan` and `recommend` know, and what linear layers in 8 bits, as torchao computes them, take on one.

Counted are the layers of the blocks that `linear_flops` counts, all of which torchao's ``quantize_`` takes; LoRA's own
matrices stay as they are. Products of 8 bits take the data sheet's share of the time of 16 bits, times a cost; each
layer's input is read, quantised row by row and written first, once for each layer, which is a pass over memory.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import Family
from ..errors import ConfigError, did_you_mean
from ..plan.layout import TokenLayout
from .work import least_weights, linear_flops, linear_inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a run may use."""

    name: str  # as users write it, such as ``rtx-4090`` or ``24GB``
    gib: float  # memory in GiB
    tflops: float | None = None  # 10^12 dense 16-bit operations a second, accumulated in 32 bits; None: not known
    attention: float = 1.0  # share of those that the best dense attention is published to reach; 1 where no figure is
    int8: float | None = None  # 10^12 dense operations a second in int8; None: not known
    # 10^12 dense operations a second in fp8, accumulated in 32 bits; None: it has no unit for that
    fp8: float | None = None
    bandwidth: float | None = None  # of its memory, 10^9 bytes a second; None: not known

    def eight_bits(self, kind: str) -> float | None:
        """Return the 10^12 operations a second of a kind of 8 bits, ``int8`` or ``fp8``; None: it has no such unit."""
        return {"int8": self.int8, "fp8": self.fp8}.get(kind)


HARDWARE: Mapping[str, Hardware] = {
    card.name: card
    for card in (
        Hardware(name="a100-40gb", gib=40, tflops=312, attention=0.73, int8=624, bandwidth=1555),
        Hardware(name="a100-80gb", gib=80, tflops=312, attention=0.73, int8=624, bandwidth=2039),
        Hardware(name="b200", gib=180, tflops=2250, attention=0.71, int8=4500, fp8=4500, bandwidth=8000),
        Hardware(name="h100", gib=80, tflops=989.4, attention=0.75, int8=1978.9, fp8=1978.9, bandwidth=3350),
        Hardware(name="h200", gib=141, tflops=989.4, attention=0.75, int8=1978.9, fp8=1978.9, bandwidth=4800),
        Hardware(name="l40s", gib=48, tflops=362, int8=733, fp8=733, bandwidth=864),
        Hardware(name="mi300x", gib=192, tflops=1307.4, int8=2614.9, fp8=2614.9, bandwidth=5300),
        Hardware(name="rtx-3090", gib=24, tflops=71, int8=284, bandwidth=936),
        Hardware(name="rtx-4090", gib=24, tflops=165.2, int8=660.6, fp8=330.3, bandwidth=1008),
        Hardware(name="rtx-5090", gib=32, tflops=209.5, int8=838, fp8=419, bandwidth=1792),
    )
}
"""Name -> card. Source: the makers' data sheets; attention: FlashAttention-2, -3 and -4, heads of 128."""


def find_hardware(text: str) -> Hardware:
    """Return the hardware of a name, such as ``h100`` or ``RTX 4090``, or of a memory size, such as ``24GB``."""
    name = re.sub(r"[\s_]+", "-", str(text).strip().lower())
    size = re.fullmatch(r"(\d+(?:\.\d+)?)-?gi?b", name)
    if size and float(size[1]) > 0:
        return Hardware(name=f"{float(size[1]):g}GB", gib=float(size[1]))
    if name not in HARDWARE:
        raise ConfigError(
            f"no hardware is called {text!r}; {did_you_mean(name, HARDWARE)}; or give its memory, such as 24GB"
        )
    return HARDWARE[name]


def card_called(device: Any) -> Hardware | None:
    """Return the card that a CUDA device is, by its name; None: one that is not known."""
    name = torch.cuda.get_device_name(device).lower()
    return next((card for card in HARDWARE.values() if all(word in name for word in card.name.split("-"))), None)


LINEAR_COST = 1.2
"""Time of an 8-bit product per FLOP over what the ratio of the data sheet's peaks gives.

By it FLUX.1-dev in fp8 is 1.34 times as fast on an H100 as in 16 bits, published 1.30 to 1.39, and CogVideoX-5b in int8
1.22 times on an A100, published 1.19 (diffusers-torchao, whole pipelines, compiled).
"""

CARD = "h100"
"""The card whose figures count where none is named."""

CONFIGS = {
    "int8": ("Int8DynamicActivationInt8WeightConfig",),
    "fp8": ("Float8DynamicActivationFloat8WeightConfig",),
    "weight-only": ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig"),
}
"""How linear layers compute -> torchao's configs: weights and activations in 8 bits, or weights alone."""

QUANTIZATIONS: Mapping[str, tuple[str, float]] = {
    "fp8": ("fp8", 1.0), "int8": ("int8", 1.0),
    "fp8-weights": ("weight-only", 1.0), "int8-weights": ("weight-only", 1.0),
    "int4": ("weight-only", 0.53), "nf4": ("weight-only", 0.56),
}  # fmt: skip
"""What `generate --quantize` takes -> how the linear layers then compute, and bytes of a weight with its scales.

fp8 and int8 are torchao's, of weights and activations, or of weights alone; int4 is torchao's in groups of 128 weights,
nf4 that of bitsandbytes in blocks of 64.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linears:
    """How the linear layers of a model compute."""

    kind: str  # of `CONFIGS`
    hardware: Hardware  # the card whose figures count
    share: float = 1.0  # of the layers' weights, by elements, that are in 8 bits
    cost: float = LINEAR_COST  # time of an 8-bit product per FLOP over what the data sheet gives; `LINEAR_COST`
    weight_bytes: float = 1.0  # of a weight, its scales included
    origin: str = ""  # who said so, where no user did, such as ``the model's config``; empty otherwise

    def time(self, family: Family, layout: TokenLayout) -> float:
        """Return the time of all of the linear layers over that in 16 bits, the quantising of their inputs included."""
        if self.kind == "weight-only":
            return 1.0
        card, peak = self.hardware, self.hardware.eight_bits(self.kind)
        assert card.tflops
        assert card.bandwidth
        assert peak
        seconds = linear_flops(family, layout) / (card.tflops * card.attention * 1e12)
        quantising = 3 * linear_inputs(family, layout) / (card.bandwidth * 1e9)  # 2 bytes are read, 1 is written
        return 1.0 - self.share + self.share * (self.cost * card.tflops / peak + quantising / seconds)

    @property
    def notes(self) -> list[str]:
        """What a user should know about the layers."""
        notes = [f"{self.share:.0%} of the linear weights are {self}, by {self.origin}"] if self.origin else []
        if self.kind == "weight-only":
            return [*notes, "weight-only layers save memory and no time: their products are in 16 bits"]
        return [
            *notes,
            "8-bit linear layers are quick in compiled blocks alone: without torch.compile FLUX.1-dev took 20 times as "
            "long in int8 and 1.3 times in fp8 as in 16 bits (diffusers-torchao, H100)",
        ]

    def __str__(self) -> str:
        return (
            f"{8 if self.weight_bytes == 1 else 4}-bit weights alone"
            if self.kind == "weight-only"
            else f"in {self.kind}, weights and activations"
        )


def linears_called(
    kind: str | None, hardware: str | Hardware | None = None, cost: float = LINEAR_COST, **more: Any
) -> Linears | None:
    """Make `Linears` of a kind's name, None of None; `ConfigError` for what the card can't do."""
    if kind is None:
        if hardware is not None:
            raise ConfigError(
                f"hardware = {hardware!r} counts for 8-bit linear layers alone here; name those too, as linears = "
                "'fp8', or ask `dit-accel recommend --hardware` for seconds"
            )
        return None
    if kind not in {*CONFIGS, *QUANTIZATIONS}:
        raise ConfigError(f"linears takes no {kind!r}; {did_you_mean(kind, (*QUANTIZATIONS, 'weight-only'))}")
    kind, size = QUANTIZATIONS.get(kind, (kind, 1.0))
    if not 0 < cost < 1000:
        raise ConfigError(
            f"linear_cost must be above 0 and below 1000, got {cost}; 1 is as fast as the data sheet says"
        )
    card = hardware if isinstance(hardware, Hardware) else find_hardware(hardware or CARD)
    if kind != "weight-only" and not card.eight_bits(kind):
        if card.tflops is None:
            raise ConfigError(f"linears = {kind!r} needs a card whose speed is known, got {card.name}; name a card")
        able = ", ".join(name for name, entry in HARDWARE.items() if entry.eight_bits(kind))
        other = "; int8 works on it" if card.eight_bits("int8") else ""
        raise ConfigError(
            f"linears = {kind!r} needs a card that multiplies in it, {card.name} does not{other}; {able} do"
        )
    return Linears(kind=kind, hardware=card, cost=cost, weight_bytes=size, **more)


def linears_of_config(config: Mapping[str, Any]) -> str | None:
    """Return the kind that a saved transformer's ``quantization_config`` names; None: none of torchao's."""
    named = str(dict(config.get("quantization_config") or {}))
    return next((kind for kind, names in CONFIGS.items() if any(f"'{name}'" in named for name in names)), None)


def linears_of(transformer: nn.Module, hardware: Hardware | None = None) -> Linears | None:
    """Read how most of a loaded transformer's linear layers compute; None: in 16 or 32 bits.

    Read off torchao's tensors, which hold 8-bit ``qdata`` and, where inputs are quantised too, ``act_quant_kwargs``.
    Without ``hardware`` it is the card that holds the weights, or `CARD` where that is not known or has no such unit.
    """
    weights: dict[str, int] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            kind = _kind(module.weight)
            weights[kind] = weights.get(kind, 0) + module.weight.numel()
    kind = max(filter(None, weights), key=weights.__getitem__, default="")
    if not kind:
        return None
    share, weight = weights[kind] / sum(weights.values()), next(transformer.parameters())
    if hardware is None and weight.is_cuda:
        card = card_called(weight.device)
        hardware = card if card and card.eight_bits(kind) else None
    return linears_called(kind, hardware, share=share, origin="the model as it is loaded")


def _kind(weight: Any) -> str:
    held = getattr(weight, "qdata", None)
    if held is None or held.element_size() != 1 or held.shape != weight.shape:  # of other shapes: 4 bits, packed
        return ""
    if getattr(weight, "act_quant_kwargs", None) is None:
        return "weight-only"
    return "fp8" if held.dtype.is_floating_point else "int8"


def weights_of(family: Family, linears: Linears | None) -> int:
    """Return the least bytes of a model's weights, with its linear layers as they compute."""
    return least_weights(family) if linears is None else least_weights(family, linears.share, linears.weight_bytes)


def weight_size(weight: Any) -> int:
    """Return the bytes of a weight; torchao's report 16 bits an element, so theirs are of the tensor inside."""
    held = getattr(weight, "qdata", weight)
    return held.numel() * held.element_size()
