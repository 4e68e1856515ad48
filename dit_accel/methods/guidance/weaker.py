"""A weaker model beside a transformer: in the transformer's own modules where it fits in, else as it is.

In these all methods act on it as on the transformer. Where processes share the transformer, the same ones share another
model too, where they can.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


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
    backends = {getattr(processor, "_attention_backend", None) for processor in _processors(transformer)}
    alike = all(getattr(processor, "_attention_backend", None) in backends for processor in _processors(weak))
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


def fits(transformer: Any, weak: Any) -> bool:
    """Tell whether a weaker model differs from a transformer in its weights alone, and these can be laid into it.

    What moves weights by itself, as offloading does, would put the transformer's back; what is hung on the weaker
    model's modules would not run.
    """
    if type(weak) is not type(transformer) or _sizes(weak) != _sizes(transformer):
        return False
    if any(_is_watched(module) for module in weak.modules()) or any(_moves(module) for module in transformer.modules()):
        return False
    kinds = [{name: _kind(weight) for name, weight in model.named_parameters()} for model in (weak, transformer)]
    return kinds[0] == kinds[1]


@contextmanager
def weights_of(weak: nn.Module, transformer: nn.Module) -> Iterator[None]:
    """Let a transformer's modules hold the weights of a weaker model that `fits`, inside the block."""
    modules, originals = dict(transformer.named_modules()), dict(transformer.named_parameters())

    def lay(weights: Mapping[str, nn.Parameter]) -> None:
        for name, weight in weights.items():
            path, _, leaf = name.rpartition(".")
            modules[path]._parameters[leaf] = weight

    lay(dict(weak.named_parameters()))
    try:
        yield
    finally:
        lay(originals)


def _sizes(model: Any) -> dict[str, Any]:
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def _kind(weight: Tensor) -> Any:
    return type(weight), weight.shape, weight.dtype, weight.device


def _is_watched(module: Any) -> bool:
    """Tell whether anything runs around a module's forward but the module itself."""
    hooks = module._forward_pre_hooks, module._forward_hooks, getattr(module, "_hf_hook", None)
    return any(hooks) or "forward" in vars(module) or module._compiled_call_impl is not None


def _moves(module: Any) -> bool:
    """Tell whether something moves or casts a module's weights around its forward."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return hasattr(module, "_hf_hook") or any("offload" in name or "casting" in name for name in hooks)
