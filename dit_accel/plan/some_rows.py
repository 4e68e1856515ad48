"""Query rows of an attention call that are computed by a rule of their own, or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowOverride:
    """Query rows that see some keys, all of them exactly, and no others, whatever the tiles say."""

    rows: Tensor  # int64 [G], token indices
    keys: Tensor  # bool [S], True for a key that they see


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReusedRows:
    """Query rows that are not computed: they keep what an earlier call gave."""

    # N lists int64 [G], rising: the token indices that are computed; row b of the batch follows list b % N. Where the
    # plan has tiles, every row of a tile that holds one of them is
    rows: tuple[Tensor, ...]
    out: Tensor  # [B, H, S, D], the output that the others keep
    keys: Tensor | None = None  # bool [N, S], the keys that computed rows see; None: all

    def of_rows(self, rows: Sequence[int]) -> "ReusedRows":
        """Return the same of some rows of the batch."""
        lists = [row % len(self.rows) for row in rows]
        keys = None if self.keys is None else self.keys[lists]
        return ReusedRows(rows=tuple(self.rows[row] for row in lists), out=self.out[list(rows)], keys=keys)
