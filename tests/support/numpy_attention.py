"""Block-sparse attention in numpy and float64, tile by tile as kernels/README.md defines it, sharing no code with it.

It is what the fuzz holds every backend against, the reference too. Everything is in loops over batches, heads and query
tiles, on plain arrays: no lists, no CSR, no bits.
"""

from dataclasses import dataclass

import numpy as np

SKIPPED, POOLED, EXACT = 0, 1, 2


@dataclass
class Case:
    """One call in arrays: q [B, H, S_q, D], k [B, HK, S_k, D], v [B, HK, S_k, Dv], `states` [G, NQ, NK] in tiled order.

    `valid` bool [B, S_k], `q_frames`, `k_frames` and everything else by token are in the caller's order. `keep` bool
    [B, H, NQ, NK] and `pinned` [NQ, NK]; `seen` bool [G, NQ, NK, block_q, block_k], tiled too, is what exact tiles let
    through; `routing` is (beta, "diag" or "exact"), `vote` (criterion, threshold).
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    states: np.ndarray
    block_q: int
    block_k: int
    scale: float
    head_scale: np.ndarray | None = None
    valid: np.ndarray | None = None
    table: np.ndarray | None = None
    q_frames: np.ndarray | None = None
    k_frames: np.ndarray | None = None
    order: np.ndarray | None = None
    mix: np.ndarray | None = None
    mix_rows: np.ndarray | None = None
    keep: np.ndarray | None = None
    rest: int = SKIPPED
    pinned: np.ndarray | None = None
    routing: tuple[float, str] | None = None
    vote: tuple[str, float] | None = None
    reverse: bool = False
    seen: np.ndarray | None = None


@dataclass
class Found:
    """Output [B, H, S_q, D], natural-log LSE [B, H, S_q], and gradients of q, k and v, if asked for."""

    out: np.ndarray
    lse: np.ndarray
    grads: list[np.ndarray]


class Attention:
    """A case with its tokens in tiled order."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.batch, self.heads, self.num_q, self.dim = case.q.shape
        self.key_heads, self.num_k = case.k.shape[1:3]
        self.rows, self.tiles = case.states.shape[1:]
        self.q_order = np.arange(self.num_q) if case.order is None else case.order
        self.k_order = np.arange(self.num_k) if case.order is None else case.order

    def queries(self, i: int) -> np.ndarray:
        """The caller's tokens of a query tile."""
        return self.q_order[i * self.case.block_q : (i + 1) * self.case.block_q]

    def keys(self, j: int) -> np.ndarray:
        """The caller's tokens of a key tile."""
        return self.k_order[j * self.case.block_k : (j + 1) * self.case.block_k]

    def valid_keys(self, b: int, j: int) -> np.ndarray:
        keys = self.keys(j)
        return keys if self.case.valid is None else keys[self.case.valid[b, keys]]

    def scale_of(self, b: int, h: int) -> float:
        return self.case.scale * (1.0 if self.case.head_scale is None else self.case.head_scale[b, h])

    def key_head(self, h: int) -> int:
        return h // (self.heads // self.key_heads)

    def decay(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """t of every pair, 1 where either is outside the video."""
        case = self.case
        if case.table is None:
            return np.ones((len(queries), len(keys)))
        one, two = case.q_frames[queries][:, None], case.k_frames[keys][None, :]
        t = case.table[np.minimum(np.abs(one - two), len(case.table) - 1)]
        return np.where((one < 0) | (two < 0), 1.0, t)

    def list_set(self, b: int, h: int) -> int:
        sets = len(self.case.states)
        return 0 if sets == 1 else h if sets == self.heads else b * self.heads + h

    def list_states(self, b: int, h: int) -> np.ndarray:
        return self.case.states[self.list_set(b, h)]

    def hidden(self, b: int, h: int, i: int, j: int) -> np.ndarray:
        """What the mask inside an exact tile leaves out of its queries and valid keys."""
        queries, valid = len(self.queries(i)), np.isin(self.keys(j), self.valid_keys(b, j))
        if self.case.seen is None:
            return np.zeros((queries, valid.sum()), bool)
        return ~self.case.seen[self.list_set(b, h), i, j, :queries, : len(valid)][:, valid]

    def states(self, b: int, h: int) -> np.ndarray:
        """States of a head's tiles, selection applied."""
        case, states = self.case, self.list_states(b, h).copy()
        pinned = np.zeros(states.shape, bool) if case.pinned is None else case.pinned
        free = (states == EXACT) & ~pinned
        if case.keep is not None:
            states[free & ~case.keep[b, h]] = case.rest
            free &= case.keep[b, h]
        if case.routing is not None:
            states[free & ~self.routed(b, h, pinned)] = POOLED
        return states

    def routed(self, b: int, h: int, pinned: np.ndarray) -> np.ndarray:
        """Which tiles' scores are above their row's threshold, bool [NQ, NK]."""
        case, (beta, kind) = self.case, self.case.routing
        mean_k = np.zeros((self.tiles, self.dim))
        counted = []
        for j in range(self.tiles):
            keys = self.valid_keys(b, j)
            if len(keys):
                mean_k[j] = case.k[b, self.key_head(h), keys].mean(0)
                if not pinned[:, j].all():
                    counted.append(j)
        above = np.zeros(pinned.shape, bool)
        for i in range(self.rows):
            mean_q = case.q[b, h, self.queries(i)].mean(0) * self.scale_of(b, h) / np.log(2)
            scores = mean_k @ mean_q
            mean = scores[counted].mean() if counted else 0.0
            if kind == "exact":
                variance = scores[counted].var() if counted else 0.0
            else:
                variance = (mean_q**2 * mean_k[counted].var(0)).sum() if counted else 0.0
            above[i] = scores > mean + beta * np.sqrt(variance + 1e-6)
        return above

    def section(self, b: int, i: int, j: int) -> int:
        """0: no mask and no decay, 1: one decay, 2: all else, 3: no valid key. Tiles are visited section by section."""
        case, keys = self.case, self.keys(j)
        if not len(self.valid_keys(b, j)):
            return 3
        t = self.decay(self.queries(i), keys)
        slow = case.block_k % 16 or len(keys) < case.block_k or len(self.valid_keys(b, j)) < len(keys)
        if slow or (t != t[0, 0]).any():
            return 2
        return int(t[0, 0] != 1)

    def visits(self, b: int, i: int, states: np.ndarray) -> list[int]:
        """Exact tiles with a valid key in the order of visits."""
        tiles = [j for j in range(self.tiles) if states[i, j] == EXACT and self.section(b, i, j) < 3]
        sign = -1 if self.case.reverse else 1
        return sorted(tiles, key=lambda j: (self.section(b, i, j), sign * j))

    def logits(self, b: int, h: int, queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decayed natural logits of exact keys, and their derivative by the undecayed ones."""
        k = self.case.k[b, self.key_head(h), keys]
        return _decayed(self.scale_of(b, h) * self.case.q[b, h, queries] @ k.T, self.decay(queries, keys))

    def voted_down(self, b: int, h: int, i: int, states: np.ndarray) -> list[int]:
        """Tiles that no row of a query tile needs."""
        (criterion, threshold), queries = self.case.vote, self.queries(i)
        visits = self.visits(b, i, states)
        if not visits:
            return []
        by_tile = [self.logits(b, h, queries, self.valid_keys(b, j))[0] for j in visits]
        peak = np.concatenate(by_tile, 1).max(1)
        needed = np.zeros((len(queries), len(visits)), bool)
        for r in range(len(queries)):
            top, total, spent = -np.inf, 0.0, 0.0
            for n, x in enumerate(by_tile):
                most, mass = x[r].max() / np.log(2), np.exp(x[r] - peak[r]).sum()
                total += mass
                if criterion == "maxgap":
                    needed[r, n] = most - top > threshold
                elif criterion == "mass":
                    needed[r, n] = mass > threshold * total
                elif n:
                    needed[r, n] = spent + mass / total > threshold
                    spent += 0.0 if needed[r, n] else mass / total
                top = max(top, most)
        return [
            j
            for n, j in enumerate(visits)
            if n and not needed[:, n].any() and not (self.case.pinned is not None and self.case.pinned[i, j])
        ]

    def columns(self, b: int, h: int, i: int, states: np.ndarray) -> list[tuple]:
        """What a query tile sees: (keys, whether they are pooled) of each tile that has any valid key."""
        seen = []
        for j in range(self.tiles):
            keys = self.valid_keys(b, j)
            if states[i, j] != SKIPPED and len(keys):
                seen.append((j, keys, states[i, j] == POOLED))
        return seen

    def heads_states(self, exact: np.ndarray | None = None) -> np.ndarray:
        """States of all tiles, [B, H, NQ, NK]; `exact` bool: those that a routing left exact, instead of its own."""
        found = np.array([[self.states(b, h) for h in range(self.heads)] for b in range(self.batch)])
        if exact is not None:
            found[(found == EXACT) & ~exact] = POOLED
            found[exact] = EXACT
        return found

    def kept(self, exact: np.ndarray) -> np.ndarray:
        """The bits of the next call, bool [B, H, NQ, NK]."""
        states, found = self.heads_states(exact), np.zeros(exact.shape, bool)
        for b, h in np.ndindex(self.batch, self.heads):
            found[b, h] = self.list_states(b, h) == EXACT if self.case.keep is None else self.case.keep[b, h]
            for i in range(self.rows):
                found[b, h, i, self.voted_down(b, h, i, states[b, h])] = False
        return found

    def run(
        self, exact: np.ndarray | None = None, grad_out: np.ndarray | None = None, grad_lse: np.ndarray | None = None
    ) -> Found:
        """Compute the call by the tiles that are `exact`, and with `grad_out` its gradients."""
        case, states = self.case, self.heads_states(exact)
        grads = [np.zeros(x.shape) for x in (case.q, case.k, case.v)]
        found = Found(np.zeros((*case.q.shape[:3], case.v.shape[3])), np.full(case.q.shape[:3], -np.inf), grads)
        mix = np.zeros((self.batch, self.heads)) if case.mix is None else case.mix
        weight = np.repeat(mix[:, :, None], self.num_q, 2)
        if case.mix_rows is not None:
            weight = weight * case.mix_rows
        grad = None if grad_out is None else (grad_out * (1 - weight[..., None]), grad_lse)
        for b, h in np.ndindex(self.batch, self.heads):
            for i in range(self.rows):
                self._attend(b, h, i, states[b, h], found, grad)
            if case.mix is not None:
                w = weight[b, h][:, None]
                found.out[b, h] = (1 - w) * found.out[b, h] + w * case.v[b, self.key_head(h)]
                if grad_out is not None:
                    grads[2][b, self.key_head(h)] += w * grad_out[b, h]
        return found

    def _attend(self, b: int, h: int, i: int, states: np.ndarray, found: Found, grad: tuple | None) -> None:
        """Softmax of one query tile over its columns, written to `found`, its gradients added to those there."""
        case, queries, kh, scale = self.case, self.queries(i), self.key_head(h), self.scale_of(b, h)
        seen, parts, q = self.columns(b, h, i, states), [], case.q[b, h, queries]
        if not seen:
            return
        for j, keys, pooled in seen:
            k, v, t = case.k[b, kh, keys], case.v[b, kh, keys], self.decay(queries, keys)
            if pooled:  # one key with the tile's means; t is the mean over all its tokens, valid or not
                k, v = k.mean(0, keepdims=True), v.mean(0, keepdims=True)
                t = self.decay(queries, self.keys(j)).mean(1, keepdims=True)
            x, slope = _decayed(scale * q @ k.T, t)
            hidden = np.zeros(x.shape, bool) if pooled else self.hidden(b, h, i, j)
            parts.append((x + np.log(len(keys)) if pooled else x, slope, hidden, k.T, v.T))
        x, slope, gone, k, v = (np.concatenate(part, 1) for part in zip(*parts, strict=True))
        k, v = k.T, v.T
        empty = gone.all(1)
        peak = np.where(gone, -np.inf, x).max(1, keepdims=True)
        peak[empty] = 0
        p = np.where(gone, 0, np.exp(np.where(gone, 0, x - peak)))
        total = p.sum(1, keepdims=True)
        p /= np.where(empty[:, None], 1, total)
        found.out[b, h, queries] = p @ v
        found.lse[b, h, queries] = np.where(empty, -np.inf, (peak + np.log(total + empty[:, None]))[:, 0])
        if grad is None:
            return
        d_out, d_lse = grad[0][b, h, queries], grad[1][b, h, queries]
        d_p = d_out @ v.T
        d_x = p * (d_p - (p * d_p).sum(1, keepdims=True) + d_lse[:, None]) * slope * scale
        found.grads[0][b, h, queries] += d_x @ k
        d_k, d_v, at = d_x.T @ q, p.T @ d_out, 0
        for _, keys, pooled in seen:
            size = 1 if pooled else len(keys)
            for one, two in ((found.grads[1], d_k), (found.grads[2], d_v)):
                one[b, kh, keys] += two[at : at + size] / (len(keys) if pooled else 1)
            at += size


def _decayed(x: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.minimum(x, t * x), np.where(t * x < x, t, 1.0)
