"""Files of weights as OpenAI's are."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn


def scripted(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as OpenAI's files hold them, a TorchScript module's."""
    root = nn.Module()
    for name, value in tensors.items():
        at, *inner = root, *name.split(".")
        for part in inner[:-1]:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.register_parameter(inner[-1], nn.Parameter(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(root), path)
