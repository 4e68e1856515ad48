"""The plans that a backward will need: each lives as long as autograd keeps the ticket that the forward gave out."""

import itertools

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import AttachError
from ..plan.plan import AttentionPlan

NO_TICKET = -1
"""The ticket of a forward that no backward follows."""


class BackwardStore:
    """Plans by number. The number is a tensor that autograd saves, eager or compiled; the plan is freed with it."""

    def __init__(self) -> None:
        self._plans: dict[int, tuple[StorageWeakRef, AttentionPlan]] = {}
        self._numbers = itertools.count()
        self._sweep_at = 64

    def __len__(self) -> int:
        self._sweep()
        return len(self._plans)

    def put(self, plan: AttentionPlan) -> Tensor:
        """Keep a plan and return its ticket, a 0-d int64 CPU tensor."""
        if len(self._plans) >= self._sweep_at:
            self._sweep()
            self._sweep_at = max(64, 2 * len(self._plans))
        number = next(self._numbers)
        ticket = torch.tensor(number)
        self._plans[number] = StorageWeakRef(ticket.untyped_storage()), plan
        return ticket

    def get(self, ticket: Tensor) -> AttentionPlan:
        """Return the plan of a ticket.

        Raises:
            AttachError: if it is gone.
        """
        entry = self._plans.get(int(ticket))
        if entry is None:
            raise AttachError(
                f"the attention plan {int(ticket)} of a forward was freed before its backward ran; run the backward "
                "while the output of the forward is alive"
            )
        return entry[1]

    def _sweep(self) -> None:
        self._plans = {number: entry for number, entry in self._plans.items() if not entry[0].expired()}
