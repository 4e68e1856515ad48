"""Whether a forward is recorded for gradients: no method may skip it, or run another one beside it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def is_recorded(value: Any) -> bool:
    """Tell whether something lies in a graph of gradients, whose forward can't be skipped."""
    return torch.is_grad_enabled() and any(requires_grad(leaf) for leaf in tree_leaves(value))


def requires_grad(value: Any) -> bool:
    """Tell whether something is a tensor that asks for gradients."""
    return isinstance(value, Tensor) and value.requires_grad
