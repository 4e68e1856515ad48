"""The attention of diffusers that computes what no method touches, by diffusers' own name of it."""

from typing import Any

from dit_accel.adapters.model_files import ModelFiles
from dit_accel.errors import ConfigError, MissingBackend, did_you_mean

from .quiet import quiet_diffusers
from .weights import empty_model


def check_attention_backend(name: str, files: ModelFiles, device: Any) -> None:
    """Refuse a backend that diffusers does not have, that can't run here, or that the model's layers leave aside.

    Raises:
        ConfigError: for an unknown name, or a model whose layers call torch's attention itself.
        MissingBackend: for one whose package is missing, or that can't compute a small call on the device.
    """
    import torch
    from diffusers.models import attention_dispatch as dispatch

    names = [backend.value for backend in dispatch.AttentionBackendName]
    if name not in names:
        raise ConfigError(f"diffusers has no attention backend {name!r}; {did_you_mean(name, names)}")
    tried = torch.zeros(1, 128, 1, 64, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    try:
        with dispatch.attention_backend(name):  # which asks for its package
            dispatch.dispatch_attention_fn(tried, tried, tried, backend=dispatch.AttentionBackendName(name))
    except Exception as error:  # every backend has errors of its own
        reason = str(error).strip().partition("\n")[0]
        raise MissingBackend(
            f"attention backend {name!r} can't be used on {device} ({reason}); leave it out, or take 'native'"
        ) from None
    cls = str(files.transformer.get("_class_name"))
    processors = [getattr(module, "processor", None) for module in empty_model(files.transformer).modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ConfigError(f"{cls} calls torch's attention itself, got attention backend {name!r}; leave it out")


def use_attention_backend(transformer: Any, name: str) -> None:
    """Let a transformer's layers call a backend of diffusers, and leave that of other models as it is."""
    from diffusers.models.attention_dispatch import attention_backend

    with quiet_diffusers(), attention_backend(name):  # diffusers sets it for all models, and this puts that back
        transformer.set_attention_backend(name)
