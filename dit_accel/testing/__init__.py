"""Public test tools: check an adapter on tiny random models; the method cases that are tried on them."""

from .adapter_checks import CHECKS, check_adapter
from .method_cases import METHOD_CASES, MethodCase
from .one_method import check_method
from .propose import Proposal, propose_adapter
from .tiny_models import TinyModel

__all__ = [
    "CHECKS",
    "METHOD_CASES",
    "MethodCase",
    "Proposal",
    "TinyModel",
    "check_adapter",
    "check_method",
    "propose_adapter",
]
