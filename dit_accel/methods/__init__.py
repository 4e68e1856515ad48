"""The methods, found by entry point, and what one is made of; `docs/adding-a-method.md` tells how to write one."""

from .attention.mask import MaskHandler, Tokens
from .attention.sparse import SparseConfig, SparseHandler
from .base import AttentionHandler, Handler, Model, Phase, Place
from .caches.cache_config import MeasuredCacheConfig, StepCacheConfig
from .caches.easy import mean_change, mean_size
from .caches.engine import StepCacheHandler, StepDecision
from .config import MethodConfig, config
from .guidance.branch import PerturbedHandler
from .guidance.guidance_config import PerturbedConfig
from .guidance.perturbed_heads import PerturbedHeadsHandler
from .options import Rule, ge, gt, le, lt, within
from .registry import register
from .saving import Saving, TileSaving
from .site import Block, ForwardContext, Site, Streams, sample_of, target_sample, with_sample

__all__ = [
    "AttentionHandler", "Block", "ForwardContext", "Handler", "MaskHandler", "MeasuredCacheConfig", "MethodConfig",
    "Model", "PerturbedConfig", "PerturbedHandler", "PerturbedHeadsHandler", "Phase", "Place", "Rule", "Saving",
    "Site", "SparseConfig", "SparseHandler", "StepCacheConfig", "StepCacheHandler", "StepDecision", "Streams",
    "TileSaving", "Tokens", "config", "ge", "gt", "le", "lt", "mean_change", "mean_size", "register", "sample_of",
    "target_sample", "with_sample", "within",
]  # fmt: skip
