"""Processors: the model's own attention processor with its one call to attention replaced by ours.

For each processor class one subclass is made. Its ``__call__`` runs the original function, re-created with one name of
its globals replaced: ``dispatch_attention_fn``, or ``F`` in processors that call
``F.scaled_dot_product_attention``. Projections, norms, RoPE, LoRA and IP-adapter code stay diffusers' own.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, UnsupportedModel
from ..plan.call import call_of
from .dense import with_loop
from .execution import Execution
from .forward_state import ForwardState
from .layers import DenseAttention
from .op import planned_attention

_OURS = ("_dit_accel_layer", "_dit_accel_sparse")


def wrap_processor(processor: Any, layer: int, classes: dict[type, type], execution: Execution) -> Any:
    """Return a processor that behaves as ``processor`` but sends attention to the plan when that is switched on.

    A copy or a pickle of it is the untouched processor.

    Args:
        processor: the module's processor; left as it is, its attributes are shared with the result.
        layer: the layer's number.
        classes: the attachment's processor class -> subclass, filled here.
        execution: the attachment's; it lives as long as its processors do.
    """
    cls = type(processor)
    if cls not in classes:
        classes[cls] = _subclass(cls, execution)
    wrapped = object.__new__(classes[cls])
    wrapped.__dict__.update(processor.__dict__)
    wrapped.__dict__.update(_dit_accel_layer=torch.tensor(layer), _dit_accel_sparse=False)
    return wrapped


def unwrap_processor(wrapped: Any, original: Any) -> Any:
    """Return ``original``, given what was set on ``wrapped`` meanwhile (an attention backend, say)."""
    original.__dict__.update({key: value for key, value in wrapped.__dict__.items() if key not in _OURS})
    return original


def retire_processor(wrapped: Any) -> None:
    """Make a wrapped processor a plain one of its original class: whoever kept it may put it back after detach."""
    original = type(wrapped).__mro__[1]
    for name in _OURS:
        wrapped.__dict__.pop(name, None)
    object.__dict__["__class__"].__set__(wrapped, original)  # the subclass hides its own class


def dense_attention_of(wrapped: Any) -> tuple[DenseAttention, bool]:
    """Return the attention call that a wrapped processor would make, on the backend set on it now, and how tensors lie.

    The second result tells whether they lie as [B, S, H, D], else [B, H, S, D].
    """
    dense, tokens_first = type(wrapped)._dit_accel_dense  # a tuple: a function would become a method

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        grouped = q.shape[2 if tokens_first else 1] != k.shape[2 if tokens_first else 1]
        if tokens_first:
            backend = getattr(wrapped, "_attention_backend", None)
            return dense(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped, backend=backend)
        return dense(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)

    return attend, tokens_first


def _subclass(cls: type, execution: Execution) -> type:
    original, forward = cls.__call__, execution.forward
    function = inspect.unwrap(original)
    names = _names(function.__code__) if isinstance(function, types.FunctionType) else set()
    if "dispatch_attention_fn" in names:
        name = "dispatch_attention_fn"
        dense = with_loop(function.__globals__[name], True, execution)
        replacement: Any = _dispatch(dense, execution)
    elif "scaled_dot_product_attention" in names and function.__globals__.get("F") is F:
        name, dense = "F", with_loop(F.scaled_dot_product_attention, False, execution)
        ours = _sdpa(dense, execution)
        replacement = types.SimpleNamespace(**dict(vars(F), scaled_dot_product_attention=ours))
    else:
        raise UnsupportedModel(
            f"the attention processor {cls.__module__}.{cls.__qualname__} calls neither dispatch_attention_fn nor "
            "F.scaled_dot_product_attention; set the model's default processors before attaching"
        )
    scope = {key: value for key, value in function.__globals__.items() if key != "__name__"}
    scope[name] = replacement
    for used in names:  # helpers in the class's module call attention too
        helper = scope.get(used)
        if isinstance(helper, types.FunctionType) and helper.__globals__ is function.__globals__:
            scope[used] = _recreated(helper, scope) if name in _names(helper.__code__) else helper
    recreated = _recreated(function, scope)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        forward.processor = self
        if not torch.compiler.is_compiling():
            forward.reached.add(int(self._dit_accel_layer))
        return recreated(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        plain = object.__new__(cls)
        plain.__dict__.update({key: value for key, value in self.__dict__.items() if key not in _OURS})
        return plain.__reduce_ex__(protocol)

    __call__.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    __call__.__defaults__ = ()  # of a class behind a `__class__` of another, torch.compile counts them
    body = {"__call__": __call__, "__reduce_ex__": __reduce_ex__, "__module__": cls.__module__, "__doc__": cls.__doc__}
    body["_dit_accel_dense"] = (dense, name != "F")
    body["_dit_accel_owner"] = execution
    body["__class__"] = property(lambda self: cls)  # diffusers' guiders look processors up by it
    return type(cls.__name__, (cls,), body)


def _recreated(function: types.FunctionType, scope: dict[str, Any]) -> types.FunctionType:
    """Return a function with other globals."""
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _names(code: types.CodeType) -> set[str]:
    """Return the global and attribute names that a function and the functions in it use."""
    inner = (_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*inner)


def _dispatch(dense: Callable[..., Tensor], execution: Execution) -> Callable[..., Tensor]:
    """Return a stand-in for diffusers' ``dispatch_attention_fn``: tensors [B, S, H, D]."""
    forward, own = execution.forward, _own_attention(dense, execution)

    def dispatch_attention_fn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        shards = None if parallel_config is None else forward.shards
        if goes_dense(forward, key.shape[1]):
            attn_mask = attn_mask if shards is None else shards.gathered_mask(attn_mask)
            return own(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa,
                attention_kwargs=attention_kwargs, backend=backend, parallel_config=parallel_config,
            )  # fmt: skip
        require_plain(dropout_p, is_causal, parallel_config if shards is None else None)
        if shards is None:
            return planned(query, key, value, attn_mask, scale, True, execution)
        heads, attn_mask = query.shape[2], shards.whole_mask(attn_mask)
        query, key, value = shards.gather_call(query, key, value)
        return shards.scatter(planned(query, key, value, attn_mask, scale, True, execution), heads)

    return dispatch_attention_fn


def _sdpa(dense: Callable[..., Tensor], execution: Execution) -> Callable[..., Tensor]:
    """Return a stand-in for ``F.scaled_dot_product_attention``: tensors [B, H, S, D]."""
    forward, own = execution.forward, _own_attention(dense, execution)

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if goes_dense(forward, key.shape[2]):
            return own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        require_plain(dropout_p, is_causal, None)
        return planned(query, key, value, attn_mask, scale, False, execution)

    return scaled_dot_product_attention


def _own_attention(dense: Callable[..., Tensor], execution: Execution) -> Callable[..., Tensor]:
    """Return the model's own attention, timed in forwards whose parts are; inside a graph nothing is added to it."""
    forward = execution.forward

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() or execution.recorder.clock.parts is None:
            return dense(query, *args, **kwargs)
        clock = execution.recorder.clock
        begin = clock.stamp(query.device)
        out = dense(query, *args, **kwargs)
        whole = not forward.processor._dit_accel_sparse or forward.not_a_step
        clock.add_part("attention" if whole else "text", begin, query.device)
        return out

    return attend


def goes_dense(forward: ForwardState, keys: int) -> bool:
    """Tell whether an attention call over this many keys goes to the user's own dense attention."""
    return not forward.processor._dit_accel_sparse or forward.not_a_step or keys < forward.min_keys


def planned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    scale: float | None,
    tokens_first: bool,
    execution: Execution,
) -> Tensor:
    """Run a planned call: through the operator where a graph or a backward needs it, else at once."""
    if mask is not None and not isinstance(mask, Tensor):
        raise ConfigError(
            f"sparse attention can't follow a mask of type {type(mask).__name__}, which the model passes for its own "
            "sparse attention; set the model to dense attention, or detach"
        )
    forward = execution.forward
    layer = forward.processor._dit_accel_layer
    differentiate = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if differentiate or torch.compiler.is_compiling() or type(q) is not Tensor:
        return planned_attention(
            q, k, v, mask, layer, forward.grid, execution.number, tokens_first, scale, differentiate
        )[0]
    call = call_of(q, k, v, mask, scale, execution.backend, tokens_first)
    return execution.attend(int(layer), call, forward.sizes)[0]


def require_plain(dropout_p: float, is_causal: bool, parallel_config: Any) -> None:
    """Raise `ConfigError` for a causal call, dropout, or parallelism of which the forward knows nothing."""
    if is_causal:
        raise ConfigError("sparse attention can't follow is_causal=True; detach it from this model")
    if dropout_p:
        raise ConfigError(f"sparse attention has no dropout, but the call asks for dropout_p={dropout_p}; set it to 0")
    if parallel_config is not None:
        raise ConfigError(
            "methods on attention do not run under context parallelism in a transformer that is compiled whole; "
            "compile its blocks (compile_repeated_blocks), disable parallelism, or detach"
        )
