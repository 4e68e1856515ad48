"""Keeps our own code out of what ``torch.compile`` traces, where a model is compiled and its forward comes through us.

A compiled model calls its wrappers from inside the compiled forward. `torch.compiler.disable` would take the model that
they call with it; here tracing stops while our code runs and goes on where the model does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch._C._dynamo.eval_frame as eval_frame  # what torch.compiler.disable is made of; it has no public name


def outside(function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args, resumed)`` with tracing stopped; within ``with resumed():`` it goes on as before."""
    tracing = eval_frame.set_eval_frame(None)

    @contextmanager
    def resumed() -> Iterator[None]:
        eval_frame.set_eval_frame(tracing)
        try:
            yield
        finally:
            eval_frame.set_eval_frame(None)

    try:
        return function(*args, resumed)
    finally:
        eval_frame.set_eval_frame(tracing)
