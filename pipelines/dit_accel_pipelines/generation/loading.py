"""Loads a diffusers pipeline from a folder or the hub onto a device, as a request asks."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from dit_accel.adapters.embedded import assets, embedded_at
from dit_accel.adapters.installed import adapter_for
from dit_accel.adapters.model_files import INDEX, model_source, read_config, read_model_files
from dit_accel.errors import ConfigError, UnsupportedModel

from .devices import pick_device
from .fit import VAE_WAYS, vae_ways
from .lora import load_loras
from .pipeline_call import pipeline_class
from .quiet import quiet_diffusers
from .request import EMBEDDED, Request
from .weights import TRANSFORMERS, check_quantized, empty_model, load_arguments, load_single_files, text_encoders


def load_pipeline(request: Request) -> Any:
    """Load the request's pipeline, with its weights, LoRAs, dtype, device, offload and the autoencoder's tiles."""
    import torch

    device = device_of(request)
    dtype, index = _dtype(request, device), read_config(request.source, INDEX, request.revision)
    parts = load_single_files(request, request.source, index, getattr(torch, dtype))
    arguments = load_arguments(request, index, getattr(torch, dtype), device)
    pipe = open_pipeline(request.source, dtype=dtype, **arguments, **parts)
    load_loras(pipe, request.lora, fuse=request.fuse_lora)
    for way in vae_ways(request.vae):
        getattr(pipe.vae, VAE_WAYS[way][1])()
    _to_device(pipe, device, request.offload)
    return pipe


def _dtype(request: Request, device: Any) -> str:
    return request.dtype or ("float32" if device.type == "cpu" else "bfloat16")


def open_pipeline(source: str, *, dtype: str, **more: Any) -> Any:
    """Load a pipeline into main memory; ``more`` goes to diffusers' `from_pretrained`.

    The autoencoder stays in float32, as Wan's own examples keep it, and takes what pipelines hand it in other formats.
    """
    import torch
    from diffusers import DiffusionPipeline

    dtypes = {"default": getattr(torch, dtype), "vae": torch.float32}
    cls = DiffusionPipeline
    if {*TRANSFORMERS} & {*more}:  # which the base class does not take where they are optional, as Wan's are
        cls = pipeline_class(read_model_files(source, more.get("revision")))
    try:
        with quiet_diffusers():
            name, options = embedded_at(source), {"dtype": dtypes, "use_safetensors": True, **more}
            pipe = assets().opened(cls, name, **options) if name else cls.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(f"diffusers can't load {source!r}: {reason}") from None
    pipe.set_progress_bar_config(disable=True)
    if dtype != "float32" and getattr(pipe, "vae", None) is not None:
        for name in ("encode", "decode"):
            setattr(pipe.vae, name, _of_any_format(pipe.vae, getattr(pipe.vae, name)))
    return pipe


def _of_any_format(vae: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return an autoencoder's method, for tensors of other number formats than its own, as FLUX's and Mochi's calls."""

    def taking(first: Any, *args: Any, **kwargs: Any) -> Any:
        return run(first.to(vae.dtype), *args, **kwargs)

    return taking


def empty_transformers(model: str | None) -> Any:
    """Return an object with a pipeline's ``components``, its transformers without memory for weights, and ``config``.

    ``model``: hub id, folder or an embedded model's name; None is the default one of these.
    """
    source = model_source(model or EMBEDDED)
    files = read_model_files(source)
    components = {}
    for name in TRANSFORMERS:
        if files.has(name):
            config = read_config(source, f"{name}/config.json")
            adapter_for(str(config.get("_class_name")))  # refuses what is not supported, by name
            components[name] = empty_model(config)
    return SimpleNamespace(components=components, config={"_name_or_path": source})


def compile_blocks(pipe: Any) -> None:
    """Compile the repeated blocks of every transformer of a pipeline, as full graphs."""
    for transformer in transformers_of(pipe):
        transformer.compile_repeated_blocks(fullgraph=True)


def transformers_of(pipe: Any) -> list[Any]:
    """Return the transformers of a pipeline."""
    components = [getattr(pipe, name, None) for name in TRANSFORMERS]
    return [component for component in components if component is not None]


def device_of(request: Request) -> Any:
    """Return the torch device of a request; `ConfigError` for one that is not there or can't do what is requested."""
    device = pick_device(request.device)
    check_quantized(request, device, _dtype(request, device))
    if request.offload != "none" and device.type == "cpu":
        raise ConfigError(f"offload {request.offload!r} needs an accelerator, got device {device}; use none")
    return device


def _to_device(pipe: Any, device: Any, offload: str) -> None:
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        stay = offload == "text" and [name for name in pipe.components if name not in text_encoders(pipe.config)]
        options = {"offload_type": "leaf_level", "use_stream": device.type == "cuda"}
        pipe.enable_group_offload(onload_device=device, exclude_modules=stay or None, **options)
