"""LiteAttention's handler driven call by call on made-up queries and keys, without a model."""

from typing import Any

import torch
from dit_accel_kernels import block_sparse_attention_eager, unpack_bits
from one_layer import ADAPTER, context_of
from torch import Tensor

from dit_accel import LiteAttention
from dit_accel.methods.attention.lite.handler import LiteHandler
from dit_accel.methods.base import Model
from dit_accel.plan.call import Call
from dit_accel.plan.context import CallContext
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan, KernelResult
from dit_accel.plan.tiling import Tiling

BLOCK = 16
MODEL = Model(adapter=ADAPTER, family=None, heads=2, layers=3, tiling=Tiling(BLOCK))


def drifting(
    tokens: int, steps: int, *, batch: int = 1, seed: int = 0, drift: float = 0.3, sharp: float = 2.0,
    dtype: torch.dtype = torch.float64,
) -> list[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Queries, keys and values [B, 2, S, 8] of successive steps; neighbouring tokens are alike, and all drift."""
    noise = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    walk = draw(3, batch, 2, tokens, 8).cumsum(-2) / tokens**0.5
    walk = walk + 0.3 * draw(*walk.shape)
    found = []
    for _ in range(steps):
        q, k, v = (sharp**0.5 * walk).to(dtype)
        found.append((q, k, v))
        walk = walk + drift * draw(*walk.shape)
    return found


class Calls:
    """Successive calls of one handler."""

    def __init__(
        self, config: LiteAttention, *, tokens: int = 80, text: int = 0, steps: int | None = 50,
        backend: str = "reference",
    ) -> None:  # fmt: skip
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in config.to_dict().items()}
        options.setdefault("dense_steps", 0)
        self.handler: Any = LiteHandler(LiteAttention(**options), MODEL)
        self.steps, self.backend, self.text = steps, backend, text
        self.step = 0
        self.tiles_run: Tensor | None = None
        self.resize(tokens)

    def resize(self, tokens: int) -> None:
        """Go on with another number of visual tokens."""
        self.layout = TokenLayout(frames=1, height=1, width=tokens, text_after=self.text)
        self.tokens = self.layout.tokens
        self.tiles = -(-self.tokens // BLOCK)

    def plan(
        self, base: AttentionPlan | None = None, call: Call | None = None, step: int | None = None, batch: int = 1,
        branch: str = "cond", layer: int = 0, row: int = 0, **context: Any,
    ) -> tuple[AttentionPlan, CallContext]:  # fmt: skip
        """Return the plan of the next call and its context."""
        when = self.context(step, batch, layer=layer, depth=layer, branch=branch, row=row, **context)
        base = base or AttentionPlan()
        if call is None:
            nothing = torch.zeros(batch, MODEL.heads, self.tokens, 8)
            call = Call(q=nothing, k=nothing, v=nothing, backend=self.backend)
        return self.handler.plan(base, call, when), when

    def finish(self, plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor, when: CallContext | None = None) -> Tensor:
        """Run a plan and let the handler learn from it."""
        assert plan.selection is not None
        ran = block_sparse_attention_eager(
            q, k, v, plan.tiles, layout="bhsd", selection=plan.selection, return_tiles=True, backend=self.backend
        )
        self.tiles_run = ran[1]
        when = when or self.context(batch=len(q))
        self.step += 1
        if plan.selection.vote is not None:
            call = Call(q=q, k=k, v=v, backend=self.backend)
            self.handler.after(plan, call, when, KernelResult(*ran))
        return ran[0]

    def run(self, q: Tensor, k: Tensor, v: Tensor, **key: Any) -> Tensor:
        """Make the next call of a key."""
        call = Call(q=q, k=k, v=v, backend=self.backend)
        plan, when = self.plan(call=call, batch=q.shape[0], **key)
        return self.finish(plan, q, k, v, when)

    def exact(self) -> Tensor:
        """Return the exact tiles of the last call, bool [B, H, N, N]."""
        assert self.tiles_run is not None
        return unpack_bits(self.tiles_run, self.tiles)

    def bits(self, branch: str = "cond", layer: int = 0, row: int = 0) -> Any:
        """Return the bits of a key's next call, int32 [B, H, N, W], or None."""
        found = [s for key, s in self.handler._states.items() if key[:4] == ("transformer", layer, branch, row)]
        return found[-1].bits if found else None

    def context(self, step: int | None = None, batch: int = 1, **changes: Any) -> CallContext:
        """Return where a call stands: the next one, or that of ``step``."""
        at = dict(batch=batch, step_index=self.step if step is None else step, num_inference_steps=self.steps)
        return context_of(self.layout, **{**at, **changes})
