"""LiteAttention's options: what a user asks for, and what that comes to on a model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from ....errors import ConfigError
from ....plan.layout import TokenLayout
from ...options import Count, ge, gt, lt
from ..sparse import SparseConfig
from .ranges import Ranges
from .thresholds import check_threshold

THRESHOLDS: Mapping[str, float] = {"maxgap": -10.0, "mass": 2.0**-10, "budget": 0.01}
"""Threshold of each criterion where none is set: the published gap, and shares of the softmax mass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiteAttention(SparseConfig):
    """Self-attention that leaves out what earlier steps found negligible (arXiv 2511.11062).

    For unset options and those that begin with ``dense`` or ``block`` see `SparseConfig`. The first call that is not
    dense by these is dense too, and votes. With another method's tile list a tile must be in that list as well.
    Thresholds by head, INT8 products and ring attention are not here. A last tile that is not full is visited last in
    both directions, unlike in the original.

    Attributes:
        criterion: what a query row must show to need a tile: ``maxgap``, a logit that comes near its largest one;
            ``mass``, a share of its softmax mass; ``budget``, one share for all tiles that the row gives up in a run.
        threshold: for ``maxgap`` in log2 units, < 0: -10 drops tiles whose largest weight is at most 2^-10 of the
            largest before it, for every row of the block. For ``mass`` and ``budget`` a share in (0, 1). Unset: -10,
            2^-10 or 0.01. A budget is split over the votes to come and bounds the mass of a tile at its vote; where
            logits drift by D log2 units afterwards, by 2^(2D) times as much.
        target_density: share of all tiles, in (0, 1), that a branch keeps over its layers, instead of votes: its first
            calls record what share of its softmax mass each tile holds at most, at 16 rows of each block row, and the
            second ones drop what lies under the threshold at which that share is kept.
        thresholds_file: instead of ``threshold``, a TOML file of thresholds by layer and step, as ``dit-accel tune
            lite`` writes it.
        detect_every: tiles vote in one of so many calls; the others follow the last vote.
        refresh_every: calls after which everything is computed and voted on again; unset: never within a generation.
        bidirectional: visit tiles from the first to the last and from the last to the first by turns, so that those
            which came early meet a nearly final maximum at the next vote.
        protect_text: text tokens see all and are seen by all. False lets them vote and be dropped as others are.
        must_keep: visual tokens that are never dropped as keys, start, end, start, end ...; rounded outward to tiles.
        must_skip: visual tokens that are dropped as keys from the first call on; rounded inward; must_keep and
            protected text take precedence.
        rest: what becomes of dropped tiles: ``skip``, ``pooled`` (each enters as one key, its tokens' mean), or
            ``cached`` (they enter as they did in the layer's last dense call, which alone votes; see ``refresh``).
        allow_positive_threshold: take a ``maxgap`` threshold of 0 or more, which drops what matters; for debugging.
    """

    name: ClassVar[str] = "lite"
    worthwhile_tokens: ClassVar[int] = 30_000  # the published gains are of 30,000 tokens and more
    # a short warm-up, since the first call that is not dense by these options is dense as well
    defaults: ClassVar[Mapping[str, Any]] = {
        "block_size": 128, "dense_steps": 0.1, "dense_last_steps": 0, "dense_layers": 0,
    }  # fmt: skip

    criterion: Literal["maxgap", "mass", "budget"] = "maxgap"
    threshold: float | None = None
    target_density: Annotated[float, gt(0), lt(1)] | None = None
    thresholds_file: str | None = None
    detect_every: Count = 1
    refresh_every: Annotated[int, ge(2), "the call that starts afresh is dense"] | None = None
    bidirectional: bool = True
    protect_text: bool = True
    must_keep: Ranges = ()
    must_skip: Ranges = ()
    rest: Literal["skip", "pooled", "cached"] = "skip"
    allow_positive_threshold: bool = False

    def __post_init__(self) -> None:
        SparseConfig.__post_init__(self)
        self.require_one_of("threshold", "target_density", "thresholds_file", of="how much is dropped")
        if self.refresh is not None or self.caches_rest:
            for name in ("target_density", "refresh_every"):
                if (value := getattr(self, name)) is not None:
                    raise ConfigError(
                        f"lite.{name} = {value} says when tiles are chosen, and so do lite.refresh and lite.rest = "
                        "'cached', by one dense call; give one of them"
                    )
        if self.criterion == "budget" and self.thresholds_file is not None:
            raise ConfigError(
                "lite.criterion = 'budget' bounds the mass dropped over a run by lite.threshold, got "
                f"lite.thresholds_file = {self.thresholds_file!r}; use 'maxgap' or 'mass' with it"
            )
        if self.criterion != "maxgap" and self.target_density is not None:
            raise ConfigError(
                f"lite.target_density = {self.target_density} ranks tiles instead of voting, got lite.criterion = "
                f"{self.criterion!r}; leave the criterion out"
            )
        if self.threshold is not None:
            check_threshold("lite.threshold", self.criterion, self.threshold, self.allow_positive_threshold)

    def filled(self, recipe: Mapping[str, Any] | None = None) -> Self:
        """Return the config with every unset option filled in; the criterion's usual threshold where none is set."""
        full: Any = SparseConfig.filled(self, recipe)
        if any(option is not None for option in (full.threshold, full.target_density, full.thresholds_file)):
            return full
        return replace(full, threshold=THRESHOLDS[full.criterion])

    def advice(self, layout: TokenLayout) -> str | None:
        parts, text = [self.advice_on_size(layout)], layout.tokens - layout.visual_tokens
        if not self.protect_text and text:
            parts.append(f"lite.protect_text = False lets the {text} text tokens be dropped too")
        return "; ".join(filter(None, parts)) or None
