"""The one way in which a module's call is wrapped: before its hooks, offloading and compiled code, and undone exactly.

``nn.Module.__call__`` asks for ``_compiled_call_impl`` in the instance first, compiled or not. That name is torch's own
affair, as is what it calls while it compiles, so nothing outside this file knows of them; copies and pickles of a
module leave the wrapper out.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch._C._dynamo import eval_frame

from ..methods.site import AroundCall

_NAME = "_compiled_call_impl"


def wrap_call(module: nn.Module, around: AroundCall, owner: Any = None) -> Callable[[], None]:
    """Let ``around`` run in place of a module's call, compiled or not, and return what undoes that.

    Compiling the module afterwards compiles what lies inside. `owner_of` gives the ``owner``.
    """
    inner, module_compile = module.__dict__.get(_NAME), module.compile

    def call(*args: Any, **kwargs: Any) -> Any:
        return around(inner or module._call_impl, args, kwargs)

    def compile(*args: Any, **kwargs: Any) -> None:
        nonlocal inner
        del module.__dict__[_NAME]
        try:
            module_compile(*args, **kwargs)
            inner = module.__dict__.get(_NAME)
        finally:
            module.__dict__[_NAME] = call

    call.owner = owner  # type: ignore[attr-defined]
    module.__dict__[_NAME] = call
    uncover = shadow(module, "compile", compile)

    def undo() -> None:
        uncover()
        if module.__dict__.get(_NAME) is call:
            del module.__dict__[_NAME]
            if inner is not None:
                module.__dict__[_NAME] = inner

    return undo


def owner_of(module: nn.Module) -> Any:
    """Return the owner of the wrapper of a module's call, or None."""
    return getattr(module.__dict__.get(_NAME), "owner", None)


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module's call is compiled, before it is wrapped."""
    return module.__dict__.get(_NAME) is not None


def is_inside_compiled() -> bool:
    """Tell whether compiled code calls the running one, which is itself no part of a graph."""
    return callable(eval_frame.get_eval_frame_callback())


class Shadow:
    """A function that stands in for a method of one object; in copies and pickles it is the copy's own method again.

    Where the object's class has no such method, copies have a context that does nothing: `contextlib.nullcontext`.
    """

    def __init__(self, of: Any, name: str, function: Callable[..., Any]) -> None:
        self._of = of
        self._name = name
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self._function(*args, **kwargs)

    def __reduce__(self) -> Any:
        if hasattr(type(self._of), self._name):
            return getattr, (self._of, self._name)
        return functools.partial, (contextlib.nullcontext,)


def shadow(of: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Let a function stand in for a method of this one module or pipeline, and return what undoes that.

    What undoes it does not keep the object alive.
    """
    before = of.__dict__.get(name)
    of.__dict__[name] = Shadow(of, name, function)
    holder, ours = weakref.ref(of), weakref.ref(of.__dict__[name])

    def undo() -> None:
        held = holder()
        if held is not None and name in held.__dict__ and held.__dict__[name] is ours():
            del held.__dict__[name]
            if before is not None:
                held.__dict__[name] = before

    return undo
