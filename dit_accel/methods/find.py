"""Finds what methods may be attached to: the transformers of a pipeline, and the attention modules of a transformer."""

import fnmatch
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from ..adapters.adapter import Adapter, Family
from ..adapters.installed import adapter_for, adapters, why_no_adapter
from ..adapters.versions import require_versions
from ..errors import ConfigError, UnsupportedModel
from .base import Model
from .caches.block_numbers import read_numbers

LayerFilter = str | Callable[[str, nn.Module], bool]
"""Which attention layers methods may change: indices such as ``"0, 3-20"``, or (module name, module) -> bool."""


def find_transformers(model: Any) -> dict[str, Any]:
    """Return the transformers of a pipeline that an adapter covers, by component name; or the transformer itself.

    For a compiled one (``torch.compile``) it is the module inside. `UnsupportedModel` is raised if there is none,
    `ConfigError` where torch or diffusers is too old.
    """
    require_versions()
    supported = {name for adapter in adapters().values() for name in adapter.transformers}
    parts = components_of(model)
    modules = {name: getattr(part, "_orig_mod", part) for name, part in parts.items()}
    known = {name: part for name, part in modules.items() if type(part).__name__ in supported}
    if known:
        return known
    classes = sorted({type(part).__name__ for part in modules.values() if isinstance(part, nn.Module)})
    is_pipeline = parts.get("transformer") is not model
    holding = f"{type(model).__name__} holds {', '.join(classes)}" if is_pipeline else f"got {type(model).__name__}"
    why = why_no_adapter(classes)
    raise UnsupportedModel(f"attach needs a pipeline or transformer that an adapter covers, {holding}; {why}")


def components_of(model: Any) -> dict[str, Any]:
    """Return a pipeline's components by name, or what was given as its only one."""
    components = getattr(model, "components", None)
    return components if isinstance(components, dict) else {"transformer": model}


def scheduler_of(model: Any) -> Any:
    """Return a pipeline's scheduler, or None."""
    return getattr(model, "scheduler", None)


def attention_modules(transformer: nn.Module, adapter: Adapter) -> list[tuple[str, nn.Module, int]]:
    """Return (name, module, depth) of the attention modules that methods may change, in the adapter's order."""
    names = {name: module for name, module in transformer.named_modules() if hasattr(module, "processor")}

    def matching(patterns: tuple[str, ...]) -> list[str]:
        return [name for pattern in patterns for name in sorted(fnmatch.filter(names, pattern), key=natural)]

    main, side = matching(adapter.self_attention), matching(adapter.side_attention)
    config: Any = transformer.config
    dense = matching(adapter.always_dense(config)) if adapter.always_dense else ()
    main = [name for name in main if name not in dense]
    if not main:
        raise UnsupportedModel(
            f"the adapter {adapter.name!r} looks for {', '.join(adapter.self_attention)} in "
            f"{type(transformer).__name__} and finds no such attention module; update the adapter"
        )
    return [(name, names[name], depth) for part in (main, side) for depth, name in enumerate(part)]


def resolve_model(name: str, transformers: dict[str, Any], scheduler: Any = None) -> Model:
    """Return what handlers may know of one transformer of a pipeline, whose scheduler may be known."""
    transformer = transformers[name]
    adapter = adapter_for(type(transformer).__name__)
    experts = sum(type(other) is type(transformer) for other in transformers.values())
    family: Family | None = adapter.family(transformer.config, experts)
    modules = attention_modules(transformer, adapter)
    heads = heads_of(modules[0][1], transformer.config)
    config = dict(transformer.config)
    return Model(adapter=adapter, family=family, heads=heads, layers=len(modules), config=config, scheduler=scheduler)


def model_of(model: Any) -> Model:
    """Return what handlers may know of a pipeline's model: of its last transformer, and the scheduler."""
    transformers = find_transformers(model)
    return resolve_model(list(transformers)[-1], transformers, scheduler_of(model))


def heads_of(module: Any, config: Any) -> int:
    """Count an attention module's heads; 0 where neither it nor its transformer's config tells."""
    names = ("heads", "num_heads", "num_attention_heads")
    return int(next((getattr(of, name) for of in (module, config) for name in names if hasattr(of, name)), 0))


def chosen_layers(
    modules: list[tuple[str, nn.Module, int]], layers: LayerFilter | None
) -> dict[int, tuple[str, nn.Module, int]]:
    """Return layer index -> (name, module, depth) of what a filter leaves; `ConfigError` if it leaves none."""
    if layers is None:
        return dict(enumerate(modules))
    if isinstance(layers, str):
        wanted = read_numbers(layers, "layers")
        if wanted[-1] >= len(modules):
            raise ConfigError(
                f"layers = {layers!r} asks for {wanted[-1]}, but the model has attention layers 0-{len(modules) - 1}; "
                "stay in that range"
            )
        return {index: modules[index] for index in wanted}
    if not callable(layers):
        raise ConfigError(
            f"layers must be indices such as '0, 3-20' or a function (name, module) -> bool, got {layers!r}"
        )
    chosen = {index: module for index, module in enumerate(modules) if layers(module[0], module[1])}
    if not chosen:
        raise ConfigError(
            f"the layers filter leaves none of the {len(modules)} attention layers ({modules[0][0]} ... "
            f"{modules[-1][0]}); let it return True for some"
        )
    return chosen


def natural(name: str) -> list[Any]:
    """Return a sort key by which ``blocks.10`` follows ``blocks.9``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
