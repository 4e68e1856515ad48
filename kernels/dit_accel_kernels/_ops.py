"""The namespace of this package's custom ops: each copy of it has its own, by the name under which it was imported.

Two versions of the package that lie in one process under two names so never meet. The names here are those of Hugging
Face's Hub kernels, whose builder puts a file of its own in this one's place.
"""

import re

import torch

NAMESPACE = re.sub(r"\W", lambda match: f"_{ord(match[0]):x}_", __package__ or "")
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """Return the full name of one of this package's ops."""
    return f"{NAMESPACE}::{op_name}"
