"""SGLang 0.5.23's registry of hooks, as far as the plugin uses it: hooks behind and around a method."""

import functools
import pkgutil
from enum import Enum
from typing import Any


class HookType(Enum):
    AFTER = "after"
    AROUND = "around"


class HookRegistry:
    _hooks: list[tuple[str, Any, HookType]] = []  # noqa: RUF012
    _patched: set[str] = set()  # noqa: RUF012

    @classmethod
    def register(cls, target: str, hook: Any, hook_type: HookType = HookType.AFTER, *, source: Any = None):
        cls._hooks.append((target, hook, hook_type))

    @classmethod
    def apply_hooks(cls):
        for target, hook, kind in cls._hooks:
            if target in cls._patched:
                continue
            cls._patched.add(target)
            path, name = target.rsplit(".", 1)
            owner = pkgutil.resolve_name(path)
            setattr(owner, name, cls._wrapped(getattr(owner, name), hook, kind))

    @staticmethod
    def _wrapped(original: Any, hook: Any, kind: HookType) -> Any:
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if kind is HookType.AROUND:
                return hook(original, *args, **kwargs)
            result = original(*args, **kwargs)
            changed = hook(result, *args, **kwargs)
            return result if changed is None else changed

        return wrapper
