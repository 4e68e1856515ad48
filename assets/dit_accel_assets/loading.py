"""The embedded models as diffusers pipelines whose call has the model's own sizes, steps and guidance as defaults."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from dit_accel_assets.catalog import KNOWN, MODELS, check_prompt, model_defaults, model_names, model_path

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")


def load(name: str = "wan-tiny", few_steps: int | None = None, **options: Any) -> DiffusionPipeline:
    """Return an embedded model's diffusers pipeline, in float32, on the CPU.

    Its class derives from the stock one, bears its name and takes the same arguments; where an argument is left out,
    the call takes `model_defaults`, not what diffusers has for models of full size. `save_pretrained` writes the stock
    pipeline.

    Args:
        name: one of `model_names`.
        few_steps: take the model's LoRA for so many steps without guidance: "wan-tiny" and 4 are "wan-tiny-4".
        options: of diffusers' ``from_pretrained``, such as ``dtype``.

    Raises:
        ValueError: for an unknown name; and by the pipeline's call, for words that the model has never seen.
    """
    name = name if few_steps is None else f"{name}-{few_steps}"
    kind = class_of_pipeline(name)
    if "torch_dtype" not in options and "dtype" not in options:
        import torch

        options["dtype"] = torch.float32  # some weights are kept in half the bytes
    return opened(kind, name, **options)


def opened(kind: type[DiffusionPipeline], name: str, **options: Any) -> DiffusionPipeline:
    """Return an embedded model as a pipeline of a class, by its ``from_pretrained`` with these options.

    A model for few steps takes the weights of the one that it was distilled from, and adds its LoRA to them.
    """
    folder, base = model_path(name), KNOWN[name].base
    if not base:
        return kind.from_pretrained(folder, **options)
    whole = kind.from_pretrained(MODELS / base, **options)
    parts = {key: part for key, part in whole.components.items() if key != "scheduler"}
    pipe = type(whole).from_pretrained(folder, **{**options, **parts})  # the base class takes no optional parts
    pipe.load_lora_weights(folder, use_safetensors=True)
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    return pipe


@cache
def class_of_pipeline(name: str) -> type[DiffusionPipeline]:
    """Return the class of an embedded model's pipeline, always the same; ValueError for an unknown name."""
    import diffusers

    defaults = model_defaults(name)
    stock = getattr(diffusers, KNOWN[name].pipeline)
    signature = inspect.signature(stock.__call__)
    places = [place.replace(default=defaults.get(place.name, place.default)) for place in signature.parameters.values()]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(self, *args, **kwargs).arguments
        for text in _texts(arguments):
            check_prompt(text, name)
        usual = {key: value for key, value in defaults.items() if f"{key}_embeds" not in arguments}
        return stock.__call__(**{**usual, **arguments})

    call.__name__, call.__doc__ = "__call__", stock.__call__.__doc__
    call.__signature__ = signature.replace(parameters=places)  # type: ignore[attr-defined]
    body = {
        "__call__": call,
        "__doc__": f"{stock.__name__} with the defaults of {name}.",
        "__module__": __name__,
        "__qualname__": name,  # under which pickle finds it here
    }
    return type(stock.__name__, (stock,), body)


def _texts(arguments: dict[str, Any]) -> Iterable[str]:
    for name in PROMPTS:
        value = arguments.get(name)
        yield from [value] if isinstance(value, str) else value or ()


def __getattr__(name: str) -> Any:
    if name in model_names():
        return class_of_pipeline(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
