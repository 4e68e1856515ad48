"""A negative text, embedded by the pipeline's own encoder."""

import inspect
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ..site import Site

_INSTEAD = "give negative_embeds, [1, tokens, C], as the pipeline makes them of a prompt"


def encoded(site: Site, prompt: str, padded: bool = False, tokens: int | None = None) -> Tensor:
    """Return a text's embeddings by the pipeline's own encoder, [1, tokens, C], without what its mask leaves out.

    Args:
        padded: keep what a mask leaves out: the model attends to it.
        tokens: how long the text should be, where ``max_sequence_length`` can make it so; None: as by default.
    """
    pipe: Any = site.pipe
    encode = getattr(pipe, "encode_prompt", None)
    if encode is None:
        where = "a transformer alone has" if pipe is None else f"{type(pipe).__name__} has"
        raise ConfigError(
            f"nag.negative_prompt = {prompt!r} needs a text encoder, and {where} no encode_prompt; {_INSTEAD}"
        )
    taken = inspect.signature(encode).parameters
    usual = inspect.signature(type(pipe).__call__).parameters
    # the encoder's own defaults may be others than the call's
    shared = {name: usual[name].default for name in ("max_sequence_length", "clean_caption") if name in usual}
    options = {"do_classifier_free_guidance": False, **shared}
    call = {"prompt": prompt, **{name: value for name, value in options.items() if name in taken}}
    call.update({name: None for name in ("prompt_2", "prompt_3") if name in taken})  # as the prompt
    embeds = _embeds(pipe, encode, call, padded)
    if tokens is not None and embeds.shape[1] != tokens and "max_sequence_length" in call:
        # an encoder may put tokens of its own in front, so that the length is not what it is called with
        call["max_sequence_length"] += tokens - embeds.shape[1]
        embeds = _embeds(pipe, encode, call, padded)
    return embeds


def _embeds(pipe: Any, encode: Any, call: dict[str, Any], padded: bool) -> Tensor:
    """Return the embeddings that a pipeline's encoder makes of a call."""
    try:
        with torch.no_grad():
            output = encode(**call)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{type(pipe).__name__} can't encode nag.negative_prompt = {call['prompt']!r} ({error}); {_INSTEAD}"
        ) from error
    embeds, *extras = output if isinstance(output, (tuple, list)) else (output,)
    if not isinstance(embeds, Tensor) or embeds.ndim != 3:
        raise ConfigError(
            f"{type(pipe).__name__} gives no embeddings [1, tokens, C] of nag.negative_prompt; {_INSTEAD}"
        )
    mask = next((other for other in extras if _is_mask(other, embeds)), None)
    if mask is not None and not padded:
        embeds = embeds[:, mask[0].bool()]
    return embeds.detach().clone()


def _is_mask(value: Any, embeds: Tensor) -> bool:
    """Tell whether one of an encoder's results is the mask of its embeddings, and leaves something."""
    if not isinstance(value, Tensor) or value.shape != embeds.shape[:2]:
        return False
    return bool(((value == 0) | (value == 1)).all()) and bool(value.any())


def require_width(text: Any, embeds: Tensor, where: str) -> Tensor:
    """Return the prompt that a transformer gets; raise `ConfigError` if it is of another kind or width than a text."""
    if not isinstance(text, Tensor):
        raise ConfigError(
            f"{where} gets its text as {type(text).__name__} here, beside which nag can't lay a negative one; detach it"
        )
    if text.shape[-1] != embeds.shape[-1]:
        raise ConfigError(
            f"nag's negative text has {embeds.shape[-1]} channels, and {where} gets a prompt of {text.shape[-1]}; "
            "encode it with this model's text encoder"
        )
    return text
