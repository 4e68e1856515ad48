"""Rows of an attention call whose output is led away from that of other rows, which hold a negative text."""

from dataclasses import dataclass

from torch import Tensor

from ..rules.guidance import normalized
from .heads import HeadShare


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizedGuidance:
    """Which rows of a call are led away from which others, and how far (`dit_accel.rules.guidance.normalized`).

    Attributes:
        positive: the rows that hold the prompt.
        negative: as many rows, in the same order, that hold a negative text and else the same tokens.
        tokens: the tokens that are led, and are the same in both afterwards; text keeps what is its own.
        scale: s.
        tau: longest G, in lengths of Z+.
        alpha: weight of G.
        heads: those of this process, where several share them; None: all.
    """

    positive: slice
    negative: slice
    tokens: slice
    scale: float
    tau: float
    alpha: float
    heads: HeadShare | None = None

    def applied(self, out: Tensor) -> Tensor:
        """Return a call's output [B, H, S, D] with these rows led; the given one is not changed.

        A token's length is that over all heads, as they stand before the output projection.
        """
        positive, negative = (
            out[rows, :, self.tokens].transpose(1, 2).flatten(2) for rows in (self.positive, self.negative)
        )
        shared = {} if self.heads is None else {"summed": self.heads.summed}
        led = normalized(positive, negative, self.scale, self.tau, self.alpha, **shared).to(out.dtype)
        led = led.unflatten(2, (out.shape[1], -1)).transpose(1, 2)
        out = out.clone()
        out[self.positive, :, self.tokens] = led
        out[self.negative, :, self.tokens] = led
        return out
