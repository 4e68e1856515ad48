"""Whether a forward is recorded for gradients: no method may skip it, or run another one beside it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def is_recorded(value: Any) -> bool:
    """Tell whether something lies in a graph of gradients, whose forward can't be skipped."""
    leaves = tree_leaves(value) if torch.is_grad_enabled() else []
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
