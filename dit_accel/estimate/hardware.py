"""Cards that `recommend` knows: how much they hold, and the least time that a run's products take on them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError, did_you_mean
from .estimate import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a run may use.

    Attributes:
        name: as users write it, such as ``rtx-4090`` or ``24GB``.
        gib: memory in GiB.
        tflops: 10^12 dense 16-bit operations a second, accumulated in 32 bits; None: not known.
        attention: share of those that the best dense attention is published to reach; 1 where no figure is.
    """

    name: str
    gib: float
    tflops: float | None = None
    attention: float = 1.0

    def seconds(self, run: Estimate) -> float | None:
        """Return the least seconds that the products of a dense run take; None where the card's speed is not known."""
        if self.tflops is None:
            return None
        others = run.total_flops - run.attention_flops
        return (others + run.attention_flops / self.attention) / (self.tflops * 1e12)


HARDWARE: Mapping[str, Hardware] = {
    one.name: one
    for one in (
        Hardware(name="a100-40gb", gib=40, tflops=312, attention=0.73),
        Hardware(name="a100-80gb", gib=80, tflops=312, attention=0.73),
        Hardware(name="b200", gib=180, tflops=2250, attention=0.71),
        Hardware(name="h100", gib=80, tflops=989.4, attention=0.75),
        Hardware(name="h200", gib=141, tflops=989.4, attention=0.75),
        Hardware(name="l40s", gib=48, tflops=362),
        Hardware(name="mi300x", gib=192, tflops=1307.4),
        Hardware(name="rtx-3090", gib=24, tflops=71),
        Hardware(name="rtx-4090", gib=24, tflops=165.2),
        Hardware(name="rtx-5090", gib=32, tflops=209.5),
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
