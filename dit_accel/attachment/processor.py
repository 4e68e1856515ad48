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
from ..plan.masks import visible_row
from .op import planned_attention

_OURS = ("_dit_accel_layer", "_dit_accel_sparse")


class Slot:
    """Where a processor leaves what its replaced attention call reads; one an attachment.

    Attributes:
        layer: the running module's layer id, a 0-d int64 CPU tensor, so that all layers share one compiled graph.
        sparse: whether the running module follows a plan; False: the user's own dense attention.
        grid: the running forward's (frames, height, width, text before, text after).
        outer_masks: `Adapter.outer_masks` of the running transformer.
        text_apart: `Adapter.text_apart` of the running transformer.
        reached: layer ids of the modules that ran in this forward, but for those of compiled blocks.
    """

    def __init__(self) -> None:
        self.layer: Tensor = torch.zeros((), dtype=torch.int64)
        self.sparse = False
        self.grid: tuple[int, ...] = (1, 1, 1, 0, 0)
        self.outer_masks = False
        self.text_apart = False
        self.reached: set[int] = set()

    def goes_dense(self, keys: int) -> bool:
        """Tell whether an attention call over this many keys goes to the user's own dense attention."""
        frames, height, width, before, after = self.grid
        visual = frames * height * width
        return not self.sparse or visual == 0 or (self.text_apart and keys < visual + before + after)


def wrap_processor(processor: Any, layer: int, classes: dict[type, type], slot: Slot, session: int) -> Any:
    """Return a processor that behaves as ``processor`` but sends its attention call to the plan when told to.

    Args:
        processor: the module's processor; left as it is, its attributes are shared with the result.
        layer: the module's layer id.
        classes: the attachment's processor class -> subclass, filled here.
        slot: the attachment's slot.
        session: id of the attachment's session.

    Raises:
        UnsupportedModel: if the processor calls neither attention function that we can replace.
    """
    cls = type(processor)
    if cls not in classes:
        classes[cls] = _subclass(cls, slot, session)
    wrapped = object.__new__(classes[cls])
    wrapped.__dict__.update(processor.__dict__)
    wrapped.__dict__.update(_dit_accel_layer=torch.tensor(layer), _dit_accel_sparse=False)
    return wrapped


def unwrap_processor(wrapped: Any, original: Any) -> Any:
    """Return ``original``, given what was set on ``wrapped`` meanwhile (an attention backend, say)."""
    original.__dict__.update({key: value for key, value in wrapped.__dict__.items() if key not in _OURS})
    return original


def _subclass(cls: type, slot: Slot, session: int) -> type:
    original = cls.__call__
    function = inspect.unwrap(original)
    names = _names(function.__code__) if isinstance(function, types.FunctionType) else set()
    if "dispatch_attention_fn" in names:
        name = "dispatch_attention_fn"
        replacement: Any = _dispatch(function.__globals__[name], slot, session)
    elif "scaled_dot_product_attention" in names and function.__globals__.get("F") is F:
        name = "F"
        replacement = types.SimpleNamespace(**dict(vars(F), scaled_dot_product_attention=_sdpa(slot, session)))
    else:
        raise UnsupportedModel(
            f"the attention processor {cls.__module__}.{cls.__qualname__} calls neither dispatch_attention_fn nor "
            "F.scaled_dot_product_attention; set the model's default processors before attaching"
        )
    scope = {key: value for key, value in function.__globals__.items() if key != "__name__"}
    scope[name] = replacement
    for used in names:  # helpers beside the class call attention too
        helper = scope.get(used)
        if isinstance(helper, types.FunctionType) and helper.__globals__ is function.__globals__:
            scope[used] = _recreated(helper, scope) if name in _names(helper.__code__) else helper
    recreated = _recreated(function, scope)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        slot.layer = self._dit_accel_layer
        slot.sparse = self._dit_accel_sparse
        if not torch.compiler.is_compiling():
            slot.reached.add(int(slot.layer))
        return recreated(self, *args, **kwargs)

    __call__.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    __call__.__defaults__ = ()  # of a class behind a `__class__` of another, torch.compile counts them
    body = {"__call__": __call__, "__module__": cls.__module__, "__doc__": cls.__doc__}
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


def _dispatch(dense: Callable[..., Tensor], slot: Slot, session: int) -> Callable[..., Tensor]:
    """Return a stand-in for diffusers' ``dispatch_attention_fn``: tensors [B, S, H, D]."""

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
        if slot.goes_dense(key.shape[1]):
            return dense(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
                backend=backend, parallel_config=parallel_config,
            )  # fmt: skip
        _refuse(dropout_p, is_causal, parallel_config)
        return _planned(query, key, value, attn_mask, slot, session, "bshd", scale)

    return dispatch_attention_fn


def _sdpa(slot: Slot, session: int) -> Callable[..., Tensor]:
    """Return a stand-in for ``F.scaled_dot_product_attention``: tensors [B, H, S, D]."""
    dense = F.scaled_dot_product_attention

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
        if slot.goes_dense(key.shape[2]):
            return dense(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        _refuse(dropout_p, is_causal, None)
        return _planned(query, key, value, attn_mask, slot, session, "bhsd", scale)

    return scaled_dot_product_attention


def _planned(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slot: Slot, session: int, layout: str, scale: float | None
) -> Tensor:
    """Hand the call to the operator, with what the running processor left in the slot.

    Where only a part of the tokens ask (the image, or all behind text and cached keys), the others' queries are made up
    and their results cut off.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise ConfigError(
            f"sparse attention can't follow a mask of type {type(mask).__name__}, which the model passes as its own "
            "sparse attention; set the model to dense attention, or detach"
        )
    if slot.outer_masks:
        mask = visible_row(mask, slot.grid[3])
    axis = 1 if layout == "bshd" else 2
    asked, silent = q.shape[axis], k.shape[axis] - q.shape[axis]
    frames, height, width, before, _ = slot.grid
    start = 0
    if silent > 0:  # asked first: where the lengths are data, nothing else may be
        start = before if asked == frames * height * width else silent
        q = F.pad(q, (0, 0) * (3 - axis) + (start, silent - start))
    differentiate = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    out = planned_attention(q, k, v, mask, slot.layer, session, slot.grid, layout, scale, differentiate)[0]
    return out.narrow(axis, start, asked) if silent > 0 else out


def _refuse(dropout_p: float, is_causal: bool, parallel_config: Any) -> None:
    if is_causal:
        raise ConfigError("sparse attention was asked for in a causal attention call; detach it from this model")
    if dropout_p:
        raise ConfigError(f"sparse attention has no dropout, the call asks for dropout_p={dropout_p}; set it to 0")
    if parallel_config is not None:
        raise ConfigError("sparse attention does not run under context parallelism yet; disable parallelism or detach")
