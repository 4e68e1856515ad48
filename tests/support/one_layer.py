"""Attention calls without a model: random ones, where they stand, and one module that runs them under methods."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_accel import RadialAttention
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.attachment.engine import Engine
from dit_accel.attachment.forward_state import as_tensors
from dit_accel.attachment.layers import Observer
from dit_accel.attachment.op import planned_attention
from dit_accel.attachment.state import DenoisingState
from dit_accel.methods.base import AttentionHandler, Handler, Model, Phase
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.config import MethodConfig
from dit_accel.plan import call as calls
from dit_accel.plan.call import Call
from dit_accel.plan.context import CallContext
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.report.report import StepReport, step_reports

ADAPTER = Adapter(name="any", transformers=(), self_attention=())
MODEL = Model(adapter=ADAPTER, family=None, heads=2, layers=1)
FAMILY = Family(
    name="some", repo="", layers=1, heads=2, head_dim=8, ffn_dim=8, patch=(1, 2, 2), vae=(4, 8), height=16, width=16,
    num_frames=9, trained_frames=3, trained_size=(4, 6),
)  # fmt: skip
"""A released model, trained on 3 latent frames of 4 x 6 tokens."""


def layout_of(size: Sequence[int], text: Sequence[int] = (0, 0)) -> TokenLayout:
    """Return the layout of frames, rows and columns, with so much text before and after them."""
    return TokenLayout(frames=size[0], height=size[1], width=size[2], text_before=text[0], text_after=text[1])


def context_of(layout: TokenLayout, **changes: Any) -> CallContext:
    """Return where a call stands: in the first layer at the first of eight steps, or as ``changes`` say."""
    values: dict[str, Any] = dict(
        transformer="transformer", layer=0, depth=0, branch="cond", step_index=0, num_inference_steps=8, sigma=None,
        layout=layout, batch=2, device=torch.device("cpu"),
    )  # fmt: skip
    return CallContext(**{**values, **changes})


def random_call(
    layout: TokenLayout, form: str = "bshd", *, sharp: float = 2, dtype=torch.float64, batch: int = 2, **changes: Any
) -> Call:
    """Return a call of 2 heads; ``form`` tells how its tensors lie, ``sharp`` how far logits spread."""
    shape = (batch, layout.tokens, 2, 8) if form == "bshd" else (batch, 2, layout.tokens, 8)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    held = (x.to(dtype) for x in (sharp * q, k, v))
    return dataclasses.replace(calls.call_of(*held, None, None, "torch", form == "bshd"), **changes)


class Fixed(AttentionHandler):
    """A method whose plan is given: it replaces whatever others planned."""

    config_type = RadialAttention
    phase = Phase.LISTS

    def __init__(self, plan: AttentionPlan, model: Model = MODEL) -> None:
        super().__init__(RadialAttention(), model)
        self.given = plan

    def plan(self, plan, call, context):
        """Return the plan."""
        return self.given


class OneLayer:
    """An attention module that methods act on.

    Args:
        methods: configs, which are made into handlers on `MODEL`, or handlers.
        backend: the kernel backend.
        steps: steps of the run; None: not known.
        tokens_first: its tensors lie as [B, S, H, D], else [B, H, S, D].
    """

    def __init__(
        self, *methods: MethodConfig | Handler, backend: str = "reference", steps: int | None = 8,
        tokens_first: bool = False,
    ) -> None:  # fmt: skip
        configs = [method for method in methods if isinstance(method, MethodConfig)]
        made = [method for method in methods if isinstance(method, Handler)]
        self.engine = Engine([*made, *make_handlers(configs, MODEL)], backend)
        self.denoising = DenoisingState(None, self.engine)
        self.state = self.engine.add_transformer("transformer", nn.Module(), ADAPTER)
        self.layer = self.engine.add_layer("transformer", MODEL.heads)
        self.layer.dense = self.attend
        self.steps, self.tokens_first, self.attended = steps, tokens_first, 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Return what the model's own attention computes, and count the call."""
        self.attended += 1
        if self.tokens_first:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2) if self.tokens_first else out

    def observe(self, callback: Observer) -> None:
        """Call ``callback`` with every planned call from now on."""
        self.engine.observers.append(callback)

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, *, step: int = 0, branch: str = "cond",
        mask: Tensor | None = None, scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the output of one call at a step; a backward may follow where q, k or v require gradients."""
        told = {"step_index": step, "num_inference_steps": self.steps}
        self.denoising.enter(self.state, branch, told)
        self.engine.begin_forward(self.denoising.context(self.state), None, len(q))
        differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        try:
            return planned_attention(
                q, k, v, mask, torch.tensor(0), as_tensors(layout.grid), self.engine.number, self.tokens_first, scale,
                differentiate,
            )[0]  # fmt: skip
        finally:
            self.denoising.leave(self.state)

    def reports(self) -> Sequence[StepReport]:
        """What ran so far, by step and branch."""
        self.engine.recorder.settle()
        return step_reports(self.engine.recorder)
