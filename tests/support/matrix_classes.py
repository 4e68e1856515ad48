"""Which of diffusers' pipeline classes build on a transformer that an adapter covers, read off the classes."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import diffusers.modular_pipelines
import diffusers.pipelines
from diffusers import DiffusionPipeline
from diffusers.modular_pipelines import ModularPipeline
from tiny_parts import blocks_of

from dit_accel.adapters import installed


@cache
def covered() -> frozenset[str]:
    """Names of the transformer classes that an adapter covers."""
    return frozenset(name for adapter in installed.adapters().values() for name in adapter.transformers)


def _defined(package: Any, base: type) -> Iterator[type]:
    """Classes of a kind that a package's modules define; modules that need what is not installed are left out."""
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            module = importlib.import_module(found.name)
        except ImportError:
            continue
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, base) and cls.__module__ == module.__name__:
                yield cls


def _transformers(cls: type) -> set[str]:
    """Names of the covered transformers that a pipeline's constructor is annotated with."""
    asked = inspect.signature(cls.__init__).parameters.values()
    return {name for one in asked for name in re.findall(r"\w+", str(one.annotation)) if name in covered()}


def _modular_transformers(cls: Any) -> set[str]:
    """The same of the components that a modular pipeline's own blocks expect."""
    if cls.default_blocks_name is None:
        return set()
    hints = (component.type_hint for component in blocks_of(cls).expected_components)
    return {name for hint in hints if hint is not None if (name := hint.__name__) in covered()}


def pipeline_classes() -> dict[str, set[str]]:
    """Return pipeline class -> the covered transformers that it builds on."""
    whole = {cls.__name__: _transformers(cls) for cls in _defined(diffusers.pipelines, DiffusionPipeline)}
    blocks = {
        cls.__name__: _modular_transformers(cls) for cls in _defined(diffusers.modular_pipelines, ModularPipeline)
    }
    return {name: found for name, found in {**whole, **blocks}.items() if found}
