"""Finds a cache that is on a transformer already, whoever put it there: a transformer takes one."""

from typing import Any

from ...errors import ConfigError


def require_no_cache(name: str, transformer: Any, requested: str) -> None:
    """Raise `ConfigError` if one of diffusers' caches, or cache-dit's, is active where ``requested`` is to be."""
    found = None
    if getattr(transformer, "is_cache_enabled", False):
        enabled = type(transformer._cache_config).__name__
        found = f"diffusers' {enabled} is enabled on it already; call pipe.{name}.disable_cache() first"
    elif getattr(transformer, "_is_cached", False) and hasattr(transformer, "_context_manager"):  # cache-dit's marks
        found = "cache-dit is active on it already; call cache_dit.disable_cache(pipe) first"
    if found:
        raise ConfigError(f"{requested} can't be attached to {name}, which takes one cache: {found}")
