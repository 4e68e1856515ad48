"""Which LoRA adapters act on a transformer, read cheaply, so that a change between two steps is seen."""

from collections.abc import Hashable
from typing import Any


def lora_state(transformer: Any) -> Hashable:
    """Return what tells one choice of peft adapters and scales from another; empty where peft is not in use.

    Seen are adapters added, removed, chosen, rescaled, switched off or merged; not seen is a weight that is written to.
    """
    if not getattr(transformer, "peft_config", None):
        return ()
    return tuple(
        (
            tuple(layer.active_adapters),
            tuple(layer.scaling.items()),
            tuple(layer.merged_adapters),
            layer.disable_adapters,
        )
        for layer in transformer.modules()
        if hasattr(layer, "active_adapters") and hasattr(layer, "scaling")
    )
