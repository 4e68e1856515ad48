"""Public test tools: check an adapter on tiny random models; the method cases that are tried on them."""

from .adapter_checks import CHECKS, check_adapter
from .method_cases import METHOD_CASES, MethodCase
from .tiny_models import TinyModel

__all__ = ["CHECKS", "METHOD_CASES", "MethodCase", "TinyModel", "check_adapter"]
