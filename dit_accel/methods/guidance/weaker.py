"""A weaker model beside a transformer that several processes share: the same processes share it, where they can."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def parallel_to_share(transformer: Any, weak: Any, inputs: Mapping[str, Any]) -> Any:
    """Return the parallelism of a transformer by which diffusers can share a weaker model in a call, or None.

    What can't be shared runs whole on every process, which gives the same: a model whose heads the degree does not
    divide, for which diffusers has no plan, or that is set up otherwise; and calls with a mask, which diffusers does
    not bring into the order in which it gathers text and picture.
    """
    parallel = getattr(transformer, "_parallel_config", None)
    config = getattr(parallel, "context_parallel_config", None)
    if config is None or type(weak) is not type(transformer) or not getattr(weak, "_cp_plan", None):
        return None
    if any("mask" in name and isinstance(value, Tensor) for name, value in inputs.items()):
        return None
    heads = weak.config.get("num_attention_heads") or 1
    if heads % config.ulysses_degree or _patch(weak) != _patch(transformer):
        return None
    backends = {getattr(one, "_attention_backend", None) for one in _processors(transformer)}
    alike = all(getattr(one, "_attention_backend", None) in backends for one in _processors(weak))
    return parallel if alike else None


def share(weak: Any, parallel: Any) -> Callable[[], None]:
    """Share a model that runs whole as another is shared; returns what undoes it.

    It is what diffusers' ``enable_parallelism`` does with a model, which would make process groups anew, and has no
    way back.
    """
    from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel

    plan = weak._cp_plan
    _tell(weak, parallel)
    apply_context_parallel(weak, parallel.context_parallel_config, plan)

    def undo() -> None:
        remove_context_parallel(weak, plan)
        _tell(weak, None)

    return undo


def _tell(weak: Any, parallel: Any) -> None:
    weak._parallel_config = parallel
    for processor in _processors(weak):
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = parallel


def _processors(model: Any) -> list[Any]:
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


def _patch(model: Any) -> Any:
    return model.config.get("patch_size")
