"""What a method is to the core: a handler that is found by the type of its config."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..adapters.adapter import Adapter, Family
from ..errors import ConfigError
from ..plan.layout import TokenLayout
from ..plan.plan import AttentionPlan, Call, CallContext
from .config import MethodConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a handler may know of the model it is attached to.

    Attributes:
        adapter: the model's adapter.
        family: the released model it has the sizes of, or None.
        heads: attention heads, H.
        layers: attention modules the adapter names, over one transformer.
    """

    adapter: Adapter
    family: Family | None
    heads: int
    layers: int


class Handler:
    """One attached method: its resolved config and, where the method needs any, its state.

    A handler belongs to one attachment. It raises `ConfigError` on creation if the method can't work on the model.

    Attributes:
        config: the config with every recipe value filled in; what the report shows.
    """

    rank: ClassVar[int] = 0
    """Lower ranks fill the plan first, in whatever order the user lists the methods: 0 lists, 1 selections, 2 rest."""

    dense_under_masks: ClassVar[bool] = False
    """Whether a call whose mask is no key padding runs dense, as the report says, instead of being refused."""

    votes: ClassVar[bool] = False
    """Whether its plans ask for votes, which not every kernel backend has."""

    def __init__(self, config: MethodConfig, model: Model) -> None:
        self.config = config
        self.model = model

    def check_layout(self, layout: TokenLayout) -> str | None:
        """Refuse a layout by raising `ConfigError`, or return a note for the report, or None."""
        return None

    def is_active(
        self, depth: int, step_index: int, num_inference_steps: int | None, sigma: float | None = None
    ) -> bool:
        """Tell whether the method changes attention in this layer at this step; decided before the forward runs."""
        return True

    def applies(self, layout: TokenLayout) -> bool:
        """Tell whether the method changes attention over a layout; where no method does, calls stay dense.

        Asked before each forward, but not before the first one of a transformer that is compiled whole.
        """
        return True

    def look(self, plan: AttentionPlan, context: CallContext, call: Call) -> None:
        """Look at the queries and keys of a call that `contribute` is about to plan; ``plan`` is what it will get."""

    def contribute(self, plan: AttentionPlan, context: CallContext) -> AttentionPlan:
        """Return ``plan`` with the method's part added."""
        return plan

    def check_with(self, others: Sequence["Handler"]) -> None:
        """Refuse what the other attached methods make impossible by raising `ConfigError`."""

    def learn(self, context: CallContext, kept: Tensor) -> None:
        """Take the bits that the votes of a call keep, int32 [B, H, NQ, W]; called where the plan asked for votes."""

    def correct(
        self, plan: AttentionPlan, context: CallContext, call: Call, v: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output of a planned call, corrected, and each head's measured error [H], None if not measured.

        Called after every planned call, active or not. ``out`` is the kernel's own and may be written to.
        """
        return out, None

    def probe_share(self, layout: TokenLayout) -> float:
        """Return the share of a call's query rows that `correct` computes densely where it measures an error."""
        return 0.0

    def wants_gaps(self, plan: AttentionPlan, context: CallContext) -> bool:
        """Tell whether `reactivate` would do anything after this call."""
        return False

    def reactivate(
        self, plan: AttentionPlan, context: CallContext, gaps: Tensor, shares: Tensor, margin: float
    ) -> None:
        """Take back tiles that probe rows find to matter; called after `learn`, where `wants_gaps` says so.

        Args:
            plan: what the call ran.
            context: when it ran.
            gaps: float32 [B, H, NQ, NK], a tile's largest logit minus its row's over all keys, in log2 units, the
                largest over the block row's probe rows; -inf where the block row has none, or the tile no valid key.
            shares: the same for a tile's share of the row's softmax mass; 0 instead of -inf.
            margin: log2 units by which a gap or share must exceed the threshold at which tiles are dropped.
        """

    def reset(self) -> None:
        """Forget everything that belongs to one generation."""

    def state_bytes(self) -> int:
        """Return the most memory that was held from step to step since attach, in bytes."""
        return 0


METHODS: dict[type[MethodConfig], type[Handler]] = {}
"""Config type -> handler type, open to every package."""


def handles(config_type: type[MethodConfig]) -> Callable[[type[Handler]], type[Handler]]:
    """Register the decorated class as the handler of ``config_type``.

    Raises:
        ConfigError: if the type or its name is taken.
    """

    def register(handler_type: type[Handler]) -> type[Handler]:
        taken = {known.name for known in METHODS}
        if config_type in METHODS or config_type.name in taken:
            raise ConfigError(f"a method called {config_type.name!r} is registered already; choose another name")
        METHODS[config_type] = handler_type
        return handler_type

    return register
