"""The torch devices of this machine."""

from typing import Any

from dit_accel.errors import ConfigError


def pick_device(requested: str | None) -> Any:
    """Return the torch device requested, or the accelerator, or the CPU."""
    import torch

    if requested is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(requested)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # whose words list all that torch was ever built for
        raise ConfigError(f"device {requested!r} can't be used here; choose from {', '.join(devices())}") from None
    return device


def devices() -> list[str]:
    """Return the torch devices of this machine, by the names under which they are requested."""
    import torch

    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{place}" for place in range(torch.accelerator.device_count()))]
