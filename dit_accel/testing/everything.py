"""A method that plans every attention call and leaves nothing out: what our kernels make of a model's own attention."""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

from ..adapters.adapter import Adapter
from ..attachment.attachment import Attachment, attach
from ..methods.base import AttentionHandler, Handler, Model, Phase
from ..methods.config import MethodConfig
from ..plan.call import Call
from ..plan.context import CallContext, StepContext
from ..plan.plan import AttentionPlan
from ..plan.tiling import Tiling


class EverythingConfig(MethodConfig):
    """Asks for `Everything`."""

    name = "everything"


class Everything(AttentionHandler):
    """Sends every attention call to the kernels from ``first_step`` on, with every tile exact."""

    config_type = EverythingConfig
    phase = Phase.LISTS
    first_step: ClassVar[int] = 0

    def is_active(self, step: StepContext, depth: int) -> bool:
        """Active from ``first_step`` on."""
        return step.step_index >= self.first_step

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        """Put lists in which every tile is exact into the plan."""
        return plan.with_tiles(*Tiling().full(context.layout, context.device))


class FromStepOne(Everything):
    """The same from the second step on."""

    first_step = 1


@contextlib.contextmanager
def planned(transformer: Any, adapter: Adapter, handler: type[Handler] = Everything) -> Iterator[Attachment]:
    """Attach so that every call goes to the kernels with every tile exact: dense, and computed by us."""
    with attach(transformer, preset="none") as attachment:
        model = Model(adapter=adapter, family=None, heads=0, layers=0)
        attachment.engine.use((handler(EverythingConfig(), model),))
        yield attachment
