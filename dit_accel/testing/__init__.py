"""Public test tools: check an adapter on tiny random models; the method cases that are tried on them."""

from .adapter_checks import CHECKS, check_adapter
from .method_cases import TRIALS, Trial
from .tiny_models import TinyModel

__all__ = ["CHECKS", "TRIALS", "TinyModel", "Trial", "check_adapter"]
