"""Gradients of planned calls. A plan lives as long as autograd keeps the ticket that the forward gave out."""

import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from dit_accel_kernels import block_sparse_attention_backward
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..adapters.adapter import Grid
from ..errors import AttachError, ConfigError
from ..plan.call import Call, call_of
from ..plan.exact_rows import gradients_of_rows
from ..plan.plan import AttentionPlan
from .kernel_call import run_dense
from .layers import AttentionLayer


@dataclass(frozen=True, slots=True)
class Differentiated:
    """A planned call that a backward will follow; its tensors are autograd's to keep."""

    plan: AttentionPlan
    layer: AttentionLayer
    sizes: Grid
    tokens_first: bool
    scale: float | None


class BackwardStore:
    """Planned calls by number, a tensor that autograd saves, eager or compiled; a call is freed with its number."""

    def __init__(self) -> None:
        self._plans: dict[int, tuple[StorageWeakRef, Differentiated]] = {}
        self._numbers = itertools.count()
        self._sweep_at = 64

    def __len__(self) -> int:
        self._sweep()
        return len(self._plans)

    def put(self, call: Differentiated) -> Tensor:
        """Keep a call and return its ticket, a 0-d int64 CPU tensor."""
        if len(self._plans) >= self._sweep_at:
            self._sweep()
            self._sweep_at = max(64, 2 * len(self._plans))
        number = next(self._numbers)
        ticket = torch.tensor(number)
        self._plans[number] = StorageWeakRef(ticket.untyped_storage()), call
        return ticket

    def get(self, ticket: Tensor) -> Differentiated:
        """Return the call of a ticket; `AttachError` if it is gone."""
        entry = self._plans.get(int(ticket))
        if entry is None:
            raise AttachError(
                f"the attention plan {int(ticket)} of a forward was freed before its backward ran; run the backward "
                "while the output of the forward is alive"
            )
        return entry[1]

    def gradients(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v under the plan of a ticket, as they lie, contiguous."""
        forward = self.get(ticket)
        plan, layer = forward.plan, forward.layer
        if plan.guidance is not None:
            raise ConfigError("attention that is guided away from a negative text has no gradient; detach nag to train")
        if plan.queries is not None:
            raise ConfigError("attention of other queries than the model's has no gradient; detach seg to train")
        call = call_of(q, k, v, mask, forward.scale, backend, forward.tokens_first)
        call, rows = call.completed(forward.sizes, layer.state.adapter.outer_masks)
        grad = call.heads_first(grad)
        if rows is not None:
            grad = F.pad(grad, (0, 0, rows.start, call.tokens - rows.stop))
        if plan.needs_kernel:
            dq, dk, dv = kernel_gradients(plan, call, grad)
        else:
            dq, dk, dv = dense_gradients(plan, call, layer, grad)
        dq, dk, dv = call.as_held(dq if rows is None else dq[:, :, rows], dk, dv)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()

    def _sweep(self) -> None:
        self._plans = {number: entry for number, entry in self._plans.items() if not entry[0].expired()}


def dense_gradients(
    plan: AttentionPlan, call: Call, layer: AttentionLayer, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v through the user's own attention; `ConfigError` if it has none."""
    try:
        of_call = torch.func.vjp(
            lambda q, k, v: run_dense(plan, replace(call, q=q, k=k, v=v), layer), call.q, call.k, call.v
        )
        return of_call[1](grad)
    except RuntimeError as error:
        raise ConfigError(
            f"the attention backend set on {layer.state.name} has no gradient that a planned call could use "
            f"({error}); set another one, such as 'native', to train with these methods"
        ) from error


def kernel_gradients(plan: AttentionPlan, call: Call, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v through our kernels."""
    call = call.with_keys(plan.centred(call.k))
    tiles, arguments = plan.kernel_arguments(call)
    rows = plan.row_override
    outer = grad if rows is None else grad.index_fill(2, rows.rows, 0)
    outer, q, k, v = call.as_held(outer, call.q, call.k, call.v)
    grads = tuple(map(call.heads_first, block_sparse_attention_backward(outer, q, k, v, tiles, **arguments)))
    if rows is not None:
        of_rows = gradients_of_rows(plan, call, grad, rows.rows, rows.keys)
        grads = tuple(part + other for part, other in zip(grads, of_rows, strict=True))
    return grads[0], plan.gradient_before_centring(grads[1], call.key_mask()), grads[2]
