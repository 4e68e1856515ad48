"""Other projects' caches, against which arms are held: cache-dit (the extra ``eval``)."""

import contextlib
import dataclasses
import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dit_accel_pipelines.generation.loading import transformers_of

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean, install

RIVALS, SERVERS = ("cache-dit",), ("sglang", "vllm-omni")
"""Caches of a pipeline that is loaded here; servers that make clips by HTTP (`servers`)."""

CALIBRATOR = "taylorseer_order"  # option of cache-dit's Taylor calibrator; given, it is used


def check_rival(name: str, options: Mapping[str, Any]) -> None:
    """Refuse an unknown rival, and an option that it has not; its options are known where it is installed."""
    if name not in RIVALS:
        raise ConfigError(f"no rival is called {name!r}; {did_you_mean(name, (*RIVALS, *SERVERS))}")
    if importlib.util.find_spec("cache_dit") is None:  # a suite's results can be read without it
        return
    from cache_dit import DBCacheConfig

    known = [CALIBRATOR, *(field.name for field in dataclasses.fields(DBCacheConfig))]
    for option in options:
        if option not in known:
            raise ConfigError(f"cache-dit has no option {option!r}; {did_you_mean(option, known)}")


def require_rivals(rivals: Iterable[str]) -> None:
    """Refuse to run rivals that are not installed."""
    if any(rivals) and importlib.util.find_spec("cache_dit") is None:
        raise ConfigError(f"the rival cache-dit needs its package, found none; {install('eval')}")


@contextlib.contextmanager
def cached_by(pipe: Any, rival: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Let another project's cache act on a pipeline for the block; without options as ``enable_cache(pipe)`` does."""
    ((name, options),) = rival.items()
    require_rivals(rival)
    check_rival(name, options)
    import cache_dit
    from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig

    settings = dict(options)
    order = settings.pop(CALIBRATOR, None)
    configs: dict[str, Any] = {"cache_config": DBCacheConfig(**settings)} if settings else {}
    if order is not None:
        configs["calibrator_config"] = TaylorSeerCalibratorConfig(taylorseer_order=order)
    with _unchanged(pipe), _silent():
        try:
            cache_dit.enable_cache(pipe, **configs)
            yield
        finally:
            cache_dit.disable_cache(pipe)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep back what is logged but errors for the block; cache-dit's loggers have levels of their own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _unchanged(pipe: Any) -> Iterator[None]:
    """Put the attributes of a pipeline's transformers back behind the block, and the order of their children."""
    modules = [module for part in transformers_of(pipe) for module in part.modules()]
    held = [(module, dict(vars(module)), dict(module._modules)) for module in modules]
    try:
        yield
    finally:
        for module, attributes, children in held:
            for values, before in ((vars(module), attributes), (module._modules, children)):
                values.clear()
                values.update(before)
