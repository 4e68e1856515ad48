"""The negative prompt of a request: what of it methods take, and where it would do nothing."""

import dataclasses
from typing import Any

from dit_accel.errors import ConfigError
from dit_accel.methods.config import MethodConfig

from .pipeline_call import CallSignature

OWN = ("negative_prompt", "negative_embeds")
"""Options of a method that leads away from a text, of which it has one."""


def with_negative(method: MethodConfig, text: str | None) -> MethodConfig:
    """Return a method that leads away from a text, with this one if it has none of its own; others as they are."""
    if text is None or any(getattr(method, name, name) is not None for name in OWN):
        return method
    return dataclasses.replace(method, **{OWN[0]: text})  # type: ignore[arg-type] - it has that field


def negative_of_methods(request: Any, call: CallSignature) -> tuple[Any, list[str]]:
    """Return a `Request` whose methods have its negative prompt, which its pipeline need not take then, and notes."""
    text = request.negative_prompt
    methods = tuple(with_negative(method, text) for method in request.methods)
    for method in methods:
        if with_negative(method, "") is not method:
            raise ConfigError(
                f"{method.name} leads away from a text, and none is set; give a negative prompt, such as 'blurry, low "
                f"quality', or set {method.name}.negative_prompt"
            )
    names = [method.name for method, before in zip(methods, request.methods, strict=True) if method is not before]
    if not names:
        return request, []
    taken = {} if call.takes("negative_prompt") else {"negative_prompt": None}
    note = f"{' and '.join(names)} leads away from the negative prompt {text!r}"
    return dataclasses.replace(request, methods=methods, **taken), [note]


def idle_negative(request: Any, call: CallSignature) -> list[str]:
    """Return a note if no method takes a resolved `Request`'s negative prompt, and its guidance scale leaves it out."""
    text = request.negative_prompt
    if text is None or any(getattr(method, OWN[0], None) == text for method in request.methods):
        return []
    name = "true_cfg_scale" if call.takes("true_cfg_scale") else "guidance_scale"
    scale = getattr(request, name)
    scale = request.beside(call).get(name) if scale is None else scale
    scale = call.default(name) if scale is None else scale
    if scale is None or scale > 1:
        return []
    higher = "" if name == "true_cfg_scale" and not request.embedded else "raise --guidance-scale, or "
    return [f"the negative prompt does nothing at {name} {scale:g}; {higher}add --nag, which leads away from it at any"]
