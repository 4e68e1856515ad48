"""The LoRA that is trained: put onto the attention of a frozen transformer, and written as diffusers loads it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel.adapters.installed import adapter_for
from dit_accel.errors import UnsupportedModel
from dit_accel.files import written_whole
from dit_accel.methods.find import attention_modules

from ..generation.lora import FILE
from .recipe import FineTuning
from .trainable import Trainable


def add_lora(transformer: Any, trainable: Trainable, recipe: FineTuning) -> dict[str, nn.Parameter]:
    """Freeze a transformer and put a LoRA onto its self-attention; return what is trained, float32, by name."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    modules = attention_modules(transformer, adapter_for(type(transformer).__name__))
    names = [projection for name, module, _ in modules for projection in _projections(name, module, trainable)]
    there = dict(transformer.named_modules())
    fused = next((name for name, module, _ in modules if getattr(module, "fused_projections", False)), None)
    if fused is not None:
        raise UnsupportedModel(f"{fused} has its queries, keys and values fused; unfuse them to train a LoRA")
    for name in names:
        if not isinstance(there.get(name), nn.Linear):
            raise UnsupportedModel(f"{type(transformer).__name__} has no linear layer {name} that a LoRA could change")
    transformer.requires_grad_(False)
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.scale, target_modules=names)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)  # the same on every process
        transformer.add_adapter(config)
    cast_training_params(transformer, torch.float32)
    return {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}


def _projections(name: str, module: nn.Module, trainable: Trainable) -> list[str]:
    projections = trainable.projections
    if trainable.joined_output is None or getattr(module, "to_out", None) is not None:
        return [f"{name}.{projection}" for projection in projections]
    block = name.rpartition(".")[0]
    return [
        *(f"{name}.{projection}" for projection in projections if not projection.startswith("to_out")),
        f"{block}.{trainable.joined_output}",
    ]


def write_lora(pipe: Any, component: str, output: Path) -> None:
    """Write the LoRA on one of a pipeline's transformers as diffusers' own file, whole or not at all.

    ``component``: the transformer's name there, by which `load_lora` finds it again.
    """
    from peft.utils import get_peft_model_state_dict

    transformer = getattr(pipe, component)
    text = {**transformer.peft_config["default"].to_dict(), "base_model_name_or_path": component}
    with written_whole(output / FILE) as temporary:
        type(pipe).save_lora_weights(
            temporary.parent,
            transformer_lora_layers=get_peft_model_state_dict(transformer),
            transformer_lora_adapter_metadata=text,
            weight_name=temporary.name,
        )
