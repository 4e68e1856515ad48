"""What was predicted of a run before it began, to stand beside what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """The speed-up that `dit-accel plan` predicts for a run's size, steps and methods.

    Attributes:
        speedup: of the denoising loop, over dense forwards alone.
        uncounted: methods that save what is known only while they run, so that nothing of theirs is in it.
        linears: how the model's linear layers compute, in its dense forwards too, such as ``in int8``; empty: in 16
            bits.
    """

    speedup: float
    uncounted: Sequence[str] = ()
    linears: str = ""

    def __str__(self) -> str:
        predicted = f"predicted {self.speedup:.2f}"
        if self.linears:
            predicted += f" with linear layers {self.linears},"
        if not self.uncounted:
            return predicted.removesuffix(",")
        names = " and ".join(self.uncounted)
        if 0.995 <= self.speedup <= 1.005:
            return f"not predicted: what {names} saves is known only while it runs"
        return f"{predicted} without {names}, whose saving is known only while it runs"
