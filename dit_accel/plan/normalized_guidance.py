"""Guidance inside attention: the prompt's rows are pushed away from those of a negative text, and normalized."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..rules.guidance import normalized
from .heads import HeadShare


class LastChange(Protocol):
    """What changes the output of an attention call, last of all."""

    def applied(self, out: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return another output [B, H, S, D]; ``rows`` are the tokens that it holds, None: all."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizedGuidance:
    """Which rows of a call are guided away from which others, and how far (`dit_accel.rules.guidance.normalized`)."""

    positive: slice  # the rows that hold the prompt
    negative: slice  # as many rows, in the same order, that hold a negative text and else the same tokens
    tokens: slice  # the tokens that are guided, and are the same in both afterwards; text keeps what is its own
    scale: float  # s
    tau: float  # longest G, in lengths of Z+
    alpha: float  # weight of G
    heads: HeadShare | None = None  # those of this process, where several share them; None: all

    def applied(self, out: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return a call's output [B, H, S, D] with these rows guided; the given one is not changed.

        A token's length is that over all heads, as they stand before the output projection.

        ``rows``: int64 [S'], the tokens that it holds, rising, S' in place of S; None: all.
        """
        tokens = self.tokens
        if rows is not None:
            tokens = slice(*(int((rows < token).sum()) for token in (tokens.start, tokens.stop)))
        positive, negative = (
            out[batch, :, tokens].transpose(1, 2).flatten(2) for batch in (self.positive, self.negative)
        )
        shared = {} if self.heads is None else {"summed": self.heads.summed}
        guided = normalized(positive, negative, self.scale, self.tau, self.alpha, **shared).to(out.dtype)
        guided = guided.unflatten(2, (out.shape[1], -1)).transpose(1, 2)
        out = out.clone()
        out[self.positive, :, tokens] = guided
        out[self.negative, :, tokens] = guided
        return out
