"""The specification of votes: which visited tiles a call keeps for the next one (LiteAttention, arXiv 2511.11062).

Tiles of a query tile are visited in the order of `visiting_order`; for a query row r, M_j is the tile's largest logit
and l_j its sum of exponentials, m and l those of everything visited before it (l with the tile), pooled tiles left
out. Row r needs tile j

- "maxgap": where M_j - m > threshold in log2 units;
- "mass": where l_j > threshold * l. That share is an upper bound of the tile's share of all exact mass;
- "budget": where e + l_j / l > threshold, e being the sum of that share over the tiles that r did not need so far.

A tile loses its bit where no valid row needs it, except the first that is visited and pinned ones. A tile without a
valid key is not visited. Tiles that were not visited keep the bit they had. Where the released LiteAttention votes a
warp at a time and with ranges, the outcome is the same, but for a ragged last tile: it is visited last in both
directions here, and 2 to 20 of some 3,000 bits differ for it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .bits import pack_bits, unpack_bits
from .problem import Problem
from .sections import valid_tiles
from .states import list_states, visiting_order
from .tiles import EXACT

VOTE_BYTES = 16_777_216  # in which a backend may keep what votes go by until they are settled


class Tally:
    """The votes of a call whose query tiles b * H * NQ + h * NQ + i are computed in any order, settled some at a time.

    The problem is in tiled order, with its selection.
    """

    def __init__(self, problem: Problem) -> None:
        selection, (batch, heads, queries, _) = problem.selection, problem.q.shape
        assert selection is not None
        assert selection.vote is not None
        self.problem, self.selection, self.vote = problem, selection, selection.vote
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []
        tiles, q_tiles, valid = problem.key_tiles, problem.query_tiles, problem.key_valid
        self.none = tiles  # stands for no tile where lists are padded to one length
        self.visit: Tensor | None = None  # of each key tile in the order of visits, where it is not that of the lists
        if selection.reverse or valid is not None or problem.decay is not None:
            visit = visiting_order(problem, selection.reverse).argsort(-1)
            visit = visit.expand(batch, -1, -1)[:, None].expand(-1, heads, -1, -1).flatten(0, 2)
            self.visit = pad(visit, (0, 1), value=tiles)
        self.q_tiles, self.last = q_tiles, queries - (q_tiles - 1) * problem.block_q  # queries of the last query tile
        self.down = torch.zeros(batch * heads * q_tiles, tiles + 1, dtype=torch.bool, device=problem.q.device)

    @property
    def by_mass(self) -> bool:
        """Whether sums of exponentials over any maximum that a query's tiles share are asked for, or log2 logits."""
        return self.vote.criterion != "maxgap"

    def settle(self, q_tiles: Tensor, tiles: Tensor, evidence: Tensor) -> None:
        """Vote of query tiles [R] on their exact key tiles [R, n], ascending, padded with `none`.

        `evidence` [n, R, block_q] as `by_mass` says, -inf or 0 in padding; it may be written to.
        """
        far = (q_tiles % self.q_tiles == self.q_tiles - 1).nonzero()[:, 0]
        evidence[:, far, self.last :] = evidence[:, far, self.last - 1, None]  # what is no query votes as the last one
        if self.visit is not None:
            order = self.visit[q_tiles].gather(-1, tiles).argsort(-1)
            tiles, evidence = tiles.gather(-1, order), evidence.gather(0, order.mT[..., None].expand(evidence.shape))
        down = ~(self._largest(evidence.unbind(0)) > self.vote.threshold).mT & ((tiles != self.none).cumsum(1) > 1)
        self.down[q_tiles[:, None], tiles] = down

    def _largest(self, evidence: Sequence[Tensor]) -> Tensor:
        """What must exceed the threshold for a tile to be kept, [n, R]; the first one's means nothing."""
        so_far, tiny = evidence[0], torch.finfo(evidence[0].dtype).tiny
        spent, largest = torch.zeros_like(so_far), [so_far.new_zeros(len(so_far))]
        for x in evidence[1:]:
            if not self.by_mass:
                margin, so_far = x - so_far, torch.maximum(so_far, x)
            else:
                so_far = so_far + x
                margin = x / so_far.clamp(min=tiny)
                if self.vote.criterion == "budget":
                    margin = spent + margin
                    spent = torch.where(margin > self.vote.threshold, spent, margin)
            largest.append(margin.amax(1))
        return torch.stack(largest)

    def hold(self, q_tiles: Tensor, tiles: Tensor, evidence: Tensor) -> None:
        """`settle`, but with as many others as `VOTE_BYTES` hold, since it takes an operation or more for each tile."""
        of_tiles = [evidence, *(x for _, _, x in self.held)]  # padded to the longest
        if max(map(len, of_tiles)) * sum(x[0].nbytes for x in of_tiles) > VOTE_BYTES:
            self._settle_held()
        self.held.append((q_tiles, tiles, evidence))

    def _settle_held(self) -> None:
        if not self.held:
            return
        all_q_tiles, all_tiles, all_evidence = zip(*self.held, strict=True)
        longest = max(map(len, all_evidence))
        tiles = [pad(x, (0, longest - x.shape[1]), value=self.none) for x in all_tiles]
        evidence = [pad(x, (0, 0, 0, 0, 0, longest - len(x))) for x in all_evidence]  # visited last, thus nobody's
        self.held.clear()
        self.settle(torch.cat(all_q_tiles), torch.cat(tiles), torch.cat(evidence, 1))

    def kept(self) -> Tensor:
        """The bits of the next call, int32 [B, H, NQ, W]."""
        self._settle_held()
        shape = (*self.problem.q.shape[:2], self.q_tiles, self.none + 1)
        down, pinned = self.down.view(shape)[..., : self.none], self.selection.pinned
        if self.problem.key_valid is not None:  # what is not visited keeps its bit
            down = down & valid_tiles(self.problem.key_valid, self.problem.block_k)[1][:, None, None]
        if pinned is not None:
            down = down & ~unpack_bits(pinned, self.none)
        keep = self.selection.keep
        bits = list_states(self.problem) == EXACT if keep is None else unpack_bits(keep, self.none)
        return pack_bits(bits & ~down)
