"""Check one method on tiny models: neutral settings change nothing, active ones do what a method of its kind must."""

from collections.abc import Callable
from functools import partial

import torch

from ..adapters.installed import adapter_for
from ..methods.caches.engine import StepCacheHandler
from ..methods.guidance.branch import PerturbedHandler
from ..methods.registry import handler_of
from .cache_checks import CacheCase, check_cache
from .guidance_checks import check_beside_guidance, check_perturbed
from .method_cases import MethodCase, configs_of
from .method_checks import check_active, check_batch
from .model_checks import check_neutral
from .tiny_models import Case, TinyModel


def check_method(tried: MethodCase, *models: TinyModel) -> dict[str, list[str]]:
    """Check a method on tiny models: as a step cache, as guidance by a perturbed forward, or as any other.

    Args:
        tried: two settings of the method, which an installed package must register.
        models: the models; none: a tiny Wan transformer.

    Returns:
        Model -> the names of the checks that it passed.

    Raises:
        AssertionError: for the first check that fails.
        ConfigError: for a method that is not registered.
        UnsupportedModel: for a model that no installed adapter covers.
    """
    passed: dict[str, list[str]] = {}
    for number, model in enumerate(models or (tiny_wan(),)):
        case, name = Case(adapter_for(model.transformer.__name__), model), f"{model.transformer.__name__} {number}"
        case.require_own_forward(name)
        checks = _checks_of(tried)
        for check in checks.values():
            check(case)
        passed[name] = list(checks)
    return passed


def _checks_of(tried: MethodCase) -> dict[str, Callable[[Case], object]]:
    """Return the checks of a method's kind by name."""
    handler = handler_of(configs_of(tried.active)[0])
    name, beside = handler.config_type.name, {"beside guidance": partial(check_beside_guidance, tried=tried)}
    if issubclass(handler, StepCacheHandler):
        cache = CacheCase(neutral=tried.neutral, active=tried.active, warm=max(1, tried.warm))
        return {"cache": lambda case: check_cache(case, name, cache), **beside}
    if issubclass(handler, PerturbedHandler):
        return {"guidance": lambda case: check_perturbed(case, tried)}
    checks = {"neutral": check_neutral, "active": check_active, "batch": check_batch}
    return {**{check: partial(function, cases={name: tried}) for check, function in checks.items()}, **beside}


def tiny_wan() -> TinyModel:
    """Return a Wan transformer of 3 blocks and 2 heads, and inputs of 7 x 4 x 8 tokens."""
    from diffusers import WanTransformer3DModel

    return TinyModel(
        transformer=WanTransformer3DModel,
        config=dict(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=32, ffn_dim=48, num_layers=3, rope_max_seq_len=64,
        ),
        inputs=lambda batch: dict(
            hidden_states=torch.randn(batch, 4, 7, 8, 16), timestep=torch.full((batch,), 500.0),
            encoder_hidden_states=torch.randn(batch, 6, 16),
        ),
        left_alone=("blocks.*.attn2",),
    )  # fmt: skip
