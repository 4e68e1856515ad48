"""Processors: the model's own attention processor with its one call to attention replaced by ours.

For each processor class one subclass is made. Its ``__call__`` runs the original function, re-created with one name of
its globals replaced: ``dispatch_attention_fn``, or ``F`` in processors that call
``F.scaled_dot_product_attention``. Projections, norms, RoPE, LoRA and IP-adapter code stay diffusers' own.

Dense attention on a CPU may go to the kernels' compiled loop, where that is faster than the attention set by the user.
It is this project's own, for sparse calls, and takes dense ones too: in bfloat16 about twice as fast as torch's on
processors that multiply bfloat16 in pairs; outputs are within rounding of the user's own.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from dit_accel_kernels import TileLists, block_sparse_attention_eager, speed_of_dense_by
from torch import Tensor

from ..errors import ConfigError, UnsupportedModel
from ..plan.call import call_of
from ..report.clock import Part
from .engine import Engine
from .layers import DenseAttention
from .op import planned_attention

LEAST_GAIN = 1.25  # a smaller one may be the measurement's error: processes would differ in rounding
LEAST_FLOPS = 1e8  # of a call: what the loop takes beside its products is more than it saves in shorter ones
TILE = 128

_OURS = ("_dit_accel_layer", "_dit_accel_sparse", "_dit_accel_keys")


def wrap_processor(processor: Any, layer: int, classes: dict[type, type], engine: Engine) -> Any:
    """Return a processor that behaves as ``processor`` but sends attention to the plan when that is switched on.

    A copy or a pickle of it is the untouched processor.

    ``processor``: the module's processor; left as it is, its attributes are shared with the result.
    """
    cls = type(processor)
    if cls not in classes:
        classes[cls] = _subclass(cls, engine)
    wrapped = object.__new__(classes[cls])
    wrapped.__dict__.update(processor.__dict__)
    wrapped.__dict__.update(_dit_accel_layer=torch.tensor(layer), _dit_accel_sparse=False, _dit_accel_keys=None)
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


def _subclass(cls: type, engine: Engine) -> type:
    original, forward = cls.__call__, engine.forward
    function = inspect.unwrap(original)
    names = _names(function.__code__) if isinstance(function, types.FunctionType) else set()
    if "dispatch_attention_fn" in names:
        name = "dispatch_attention_fn"
        dense = with_loop(function.__globals__[name], True, engine)
        replacement: Any = stand_in(dense, True, engine)
    elif "scaled_dot_product_attention" in names and function.__globals__.get("F") is F:
        name, dense = "F", with_loop(F.scaled_dot_product_attention, False, engine)
        ours = stand_in(dense, False, engine)
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
    body["_dit_accel_owner"] = engine
    body["__class__"] = property(lambda self: cls)  # diffusers' guiders look processors up by it
    return type(cls.__name__, (cls,), body)


def _recreated(function: types.FunctionType, scope: dict[str, Any]) -> types.FunctionType:
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*inner)


def stand_in(dense: Callable[..., Tensor], tokens_first: bool, engine: Engine) -> Callable[..., Tensor]:
    """Make the stand-in for ``dispatch_attention_fn`` or ``F.scaled_dot_product_attention``.

    ``tokens_first``: whether it takes tensors as [B, S, H, D], else as [B, H, S, D].
    """
    forward, tokens = engine.forward, 1 if tokens_first else 2

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        **further: Any,
    ) -> Tensor:
        if (change := forward.processor._dit_accel_keys) is not None:
            key, value, attn_mask = change(key, value, attn_mask, tokens)
        shards = None if further.get("parallel_config") is None else forward.shards
        planned = forward.processor._dit_accel_sparse and not forward.not_a_step
        if not planned or key.shape[tokens] < forward.min_keys:
            attn_mask = attn_mask if shards is None else shards.gathered_mask(attn_mask)
            return _own_attention(
                dense, engine, "text" if planned else "attention", query, key, value, attn_mask=attn_mask,
                dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, **further,
            )  # fmt: skip
        if is_causal or dropout_p or (shards is None and further.get("parallel_config") is not None):
            _refuse(dropout_p, is_causal)
        heads = query.shape[2]
        if shards is not None:
            attn_mask = shards.whole_mask(attn_mask)  # plans are of the whole sequence, whoever holds its parts
            query, key, value = shards.gather_call(query, key, value)
        out = _planned(query, key, value, attn_mask, scale, tokens_first, engine)
        return out if shards is None else shards.scatter(out, heads)

    return attend


def _planned(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None, tokens_first: bool, engine: Engine
) -> Tensor:
    """Run a planned call: through the operator where a graph or a backward needs it, else at once."""
    if mask is not None and not isinstance(mask, Tensor):
        raise ConfigError(
            f"sparse attention can't follow a mask of type {type(mask).__name__}, which the model passes for its own "
            "sparse attention; set the model to dense attention, or detach"
        )
    forward = engine.forward
    layer = forward.processor._dit_accel_layer
    differentiate = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if differentiate or torch.compiler.is_compiling() or type(q) is not Tensor:
        number = engine.number
        return planned_attention(q, k, v, mask, layer, forward.grid, number, tokens_first, scale, differentiate)[0]
    call = call_of(q, k, v, mask, scale, engine.backend, tokens_first)
    return engine.attend(engine.layers[int(layer)], call, forward.sizes)[0]


def _refuse(dropout_p: float, is_causal: bool) -> None:
    """Raise `ConfigError` for a causal call, dropout, or parallelism of which the forward knows nothing."""
    if is_causal:
        raise ConfigError("sparse attention can't follow is_causal=True; detach it from this model")
    if dropout_p:
        raise ConfigError(f"sparse attention has no dropout, but the call asks for dropout_p={dropout_p}; set it to 0")
    raise ConfigError(
        "methods on attention do not run under context parallelism in a transformer that is compiled whole; "
        "compile its blocks (compile_repeated_blocks), disable parallelism, or detach"
    )


def _own_attention(dense: Callable[..., Tensor], engine: Engine, part: Part, query: Tensor, *args: Any, **call: Any):
    """Return the model's own attention, timed in forwards whose parts are; inside a graph nothing is added to it."""
    if torch.compiler.is_compiling() or engine.recorder.clock.parts is None:
        return dense(query, *args, **call)
    clock = engine.recorder.clock
    begin = clock.stamp(query.device)
    out = dense(query, *args, **call)
    clock.add_part(part, begin, query.device)
    return out


def with_loop(dense: Callable[..., Tensor], tokens_first: bool, engine: Engine) -> Callable[..., Tensor]:
    """Wrap dense attention; use our CPU loop where the attachment lets it and it is faster."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
        if torch.compiler.is_compiling() or engine.dense != "auto" or not _is_torchs(tokens_first, **call):
            return dense(query, key, value, **call)
        speed = _speed(query, key, value, tokens_first)
        if speed is None:
            return dense(query, key, value, **call)
        engine.recorder.dense_by_loop(query, speed)
        return _by_loop(query, key, value, call.get("scale"), tokens_first)

    return attend


def _is_torchs(
    tokens_first: bool, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: Any = None,
    enable_gqa: Any = None, **options: Any,
) -> bool:  # fmt: skip
    """Whether diffusers would compute a call by torch's attention and nothing special."""
    backend = options.get("backend")
    if attn_mask is not None or dropout_p or is_causal:
        return False
    if any(value for name, value in options.items() if name != "backend"):
        return False
    if backend is None and tokens_first:  # of `dispatch_attention_fn`: what is set for all models
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        backend, _ = _AttentionBackendRegistry.get_active_backend()
    return backend is None or getattr(backend, "value", backend) == "native"


def _speed(query: Tensor, key: Tensor, value: Tensor, tokens_first: bool) -> float | None:
    """Return the loop's speed over torch's in a call; None where it is not taken."""
    tensors = (query, key, value)
    if any(type(x) is not Tensor or x.ndim != 4 or x.device.type != "cpu" for x in tensors):
        return None
    if torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return None
    if 4.0 * query.numel() * key.shape[1 if tokens_first else 2] < LEAST_FLOPS:
        return None
    chosen = speed_of_dense_by(query.device, query.dtype, query.shape[3])
    if chosen is None or chosen.name != "torch" or chosen.speed is None:
        return None
    return chosen.speed if chosen.speed >= LEAST_GAIN else None


def _by_loop(query: Tensor, key: Tensor, value: Tensor, scale: float | None, tokens_first: bool) -> Tensor:
    axis, layout = (1, "bshd") if tokens_first else (2, "bhsd")
    tiles = TileLists.full(query.shape[axis], key.shape[axis], block_q=TILE, block_k=TILE)
    out = block_sparse_attention_eager(query, key, value, tiles, layout=layout, scale=scale, backend="torch")
    assert isinstance(out, Tensor)
    return out
