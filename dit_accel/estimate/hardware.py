"""Cards that `plan` and `recommend` know: how much they hold, and the least time that a run's products take on them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from .estimate import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a run may use.

    Attributes:
        name: as users write it, such as ``rtx-4090`` or ``24GB``.
        gib: memory in GiB.
        tflops: 10^12 dense 16-bit operations a second, accumulated in 32 bits; None: not known.
        attention: share of those that the best dense attention is published to reach; 1 where no figure is.
        int8: 10^12 dense operations a second in int8; None: not known.
        fp8: 10^12 dense operations a second in fp8, accumulated in 32 bits; None: it has no unit for that.
        bandwidth: of its memory, 10^9 bytes a second; None: not known.
    """

    name: str
    gib: float
    tflops: float | None = None
    attention: float = 1.0
    int8: float | None = None
    fp8: float | None = None
    bandwidth: float | None = None

    def eight_bits(self, kind: str) -> float | None:
        """Return the 10^12 operations a second of a kind of 8 bits, ``int8`` or ``fp8``; None: it has no such unit."""
        return {"int8": self.int8, "fp8": self.fp8}.get(kind)

    def seconds(self, run: Estimate) -> float | None:
        """Return the least seconds that the products of a dense run take; None where the card's speed is not known."""
        if self.tflops is None:
            return None
        others = run.total_flops * (1 - run.attention_share - run.saved_by_linears)
        return (others + run.attention_flops / self.attention) / (self.tflops * 1e12)


HARDWARE: Mapping[str, Hardware] = {
    one.name: one
    for one in (
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
    """Return the hardware of a name, such as ``h100`` or ``RTX 4090``, or of a memory size, such as ``24GB``.

    Raises:
        ConfigError: for another text, with the names that are known.
    """
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
