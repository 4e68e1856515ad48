"""Weights in fewer bits, or from a single file: what a request names is checked before anything is loaded."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dit_accel.adapters.model_files import ModelFiles
from dit_accel.errors import ConfigError, MissingBackend, install

from .options import RunOptions
from .quiet import quiet_diffusers

TRANSFORMERS = ("transformer", "transformer_2")
"""The components of a pipeline that denoise."""

TORCHAO = {
    "fp8": "Float8DynamicActivationFloat8WeightConfig", "int8": "Int8DynamicActivationInt8WeightConfig",
    "fp8-weights": "Float8WeightOnlyConfig", "int8-weights": "Int8WeightOnlyConfig", "int4": "Int4WeightOnlyConfig",
}  # fmt: skip
"""Name -> torchao's config; nf4 is that of bitsandbytes."""

INT4 = {"group_size": 128, "int4_packing_format": "tile_packed_to_4d"}  # the packing that needs no further library

LEAST_CAPABILITY = {"fp8": (8, 9), "int4": (8, 0)}
"""Name -> the compute capability of NVIDIA's cards from which on they have its products."""

GGUF, SAFETENSORS = ".gguf", ".safetensors"

Options = TypeVar("Options", bound=RunOptions)


def split_component(text: str) -> tuple[str | None, str]:
    """Split ``transformer_2:FILE`` into the component and the file; None where no component is named."""
    component, colon, rest = text.partition(":")
    return (component, rest) if colon and component in TRANSFORMERS else (None, text)


def weight_files(request: RunOptions) -> dict[str, Path]:
    """Return the single files of a request: component -> file."""
    named = [split_component(text) for text in request.transformer]
    return {component or TRANSFORMERS[0]: Path(name) for component, name in named}


def check_weight_files(request: RunOptions) -> None:
    """Refuse single files that are not there, that can't be read safely, or two of one component."""
    files = weight_files(request)
    if len(files) < len(request.transformer):
        raise ConfigError(
            f"transformer takes one file for each, got {', '.join(request.transformer)}; name that of the second "
            "expert as transformer_2:FILE"
        )
    for path in files.values():
        if path.suffix.lower() not in (GGUF, SAFETENSORS) or not path.is_file():
            raise ConfigError(f"there is no .safetensors or .gguf file at transformer {path}; give one")
        if path.suffix.lower() == GGUF and request.quantize is not None:
            raise ConfigError(f"quantize {request.quantize!r} would quantise {path} again; leave one of them out")
        if path.suffix.lower() == GGUF:
            _require("gguf", "a .gguf file")


def named_by_file(request: Options) -> tuple[Options, list[str]]:
    """Return a request whose ``model`` is a single file as one of the model that diffusers knows for it, and a note."""
    path = Path(request.model or "")
    if path.suffix.lower() not in (GGUF, SAFETENSORS) or not path.is_file():
        return request, []
    import torch
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

    names = {key: torch.empty(shape, device="meta") for key, shape in shapes_of(path).items()}
    if infer_diffusers_model_type(names) == "v1":  # what diffusers takes all that it does not know for
        raise ConfigError(
            f"diffusers can't tell which model {path} is of; name that by --model, and the file by --transformer"
        )
    model = fetch_diffusers_config(names)["pretrained_model_name_or_path"]
    changed = dataclasses.replace(request, model=model, transformer=(*request.transformer, str(path)))
    return changed, [f"{path} is taken as the transformer of {model}, whose other parts are loaded from there"]


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of a file's tensors, no weights."""
    if path.suffix.lower() == GGUF:
        _require("gguf", "a .gguf file")
        from gguf import GGUFReader  # pyright: ignore[reportMissingImports]

        return {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in GGUFReader(path).tensors}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def check_weights(request: RunOptions, files: ModelFiles) -> None:
    """Refuse weights that a model can't take: quantised twice, of no text encoder, or where no single file goes."""
    import diffusers

    if request.quantize is not None and files.transformer.get("quantization_config"):
        raise ConfigError(f"quantize {request.quantize!r} would quantise {files.name} again; leave it out")
    if request.revision is not None and Path(files.name).exists():
        raise ConfigError(f"revision {request.revision!r} is of a hub id, and {files.name} is a folder; leave it out")
    kind = request.quantize_text_encoder
    if kind is not None and not text_encoders(files.index):
        raise ConfigError(f"quantize_text_encoder {kind!r} has nothing to act on in {files.name}; leave it out")
    for component in weight_files(request):
        name = str((files.index.get(component) or ["", None])[1])
        if not hasattr(getattr(diffusers, name, None), "from_single_file"):
            has = f"is a {name}" if files.has(component) else "is not there"
            raise ConfigError(f"no single file can be loaded as {component} of {files.name}, which {has}; leave it out")


def empty_model(config: Mapping[str, Any]) -> Any:
    """Return the diffusers model of a config, without memory for its weights."""
    import diffusers
    from accelerate import init_empty_weights

    with quiet_diffusers(), init_empty_weights():
        return getattr(diffusers, str(config.get("_class_name"))).from_config(dict(config))


def text_encoders(index: Mapping[str, Any]) -> list[str]:
    """Return the names of a pipeline's text encoders."""
    entries = {name: entry for name, entry in index.items() if name.startswith("text_encoder")}
    return [name for name, entry in entries.items() if isinstance(entry, (list, tuple)) and entry[0] == "transformers"]


def check_quantized(request: RunOptions, device: Any, dtype: str) -> None:
    """Refuse, by its name, a quantisation that needs another device, number format or a library that is missing."""
    import torch

    for option in ("quantize", "quantize_text_encoder"):
        kind = getattr(request, option)
        if kind is None:
            continue
        least = LEAST_CAPABILITY.get(kind)
        if device.type == "cpu" and (least or kind == "nf4"):
            raise ConfigError(f"{option} {kind!r} needs a card, got device cpu; int8, int8-weights, fp8-weights do not")
        _require("bitsandbytes" if kind == "nf4" else "torchao", f"{option} {kind!r}")
        have = torch.cuda.get_device_capability(device) if device.type == "cuda" and not torch.version.hip else None
        if least and have and have < least:
            raise ConfigError(f"{option} {kind!r} needs compute capability {least}, got {have}; take int8-weights")
        if kind == "int4" and dtype != "bfloat16":
            raise ConfigError(f"{option} 'int4' computes in bfloat16 alone, got dtype {dtype}; take --dtype bfloat16")


def _require(library: str, what: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise MissingBackend(f"{what} needs {library}, which is not installed; {install('quantize')}")


def slow_products(request: RunOptions) -> list[str]:
    """Return a warning for products in 8 bits whose blocks are not compiled."""
    kind = request.quantize
    if kind not in ("int8", "fp8") or request.compile:
        return []
    return [f"quantize {kind!r} is quick in compiled blocks alone: add --compile, or take {kind}-weights"]


def load_arguments(request: RunOptions, index: Mapping[str, Any], dtype: Any, device: Any) -> dict[str, Any]:
    """Return what `from_pretrained` of a pipeline takes for a request's weights, single files loaded.

    ``index``: the pipeline's ``model_index.json``; ``dtype``: the transformer's torch dtype.
    """
    from diffusers import PipelineQuantizationConfig

    arguments: dict[str, Any] = {"variant": request.variant, "revision": request.revision}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    mapping: dict[str, Any] = {}
    if request.quantize is not None:
        single = weight_files(request)
        present = [name for name in TRANSFORMERS if name not in single and (index.get(name) or [None])[0]]
        mapping |= dict.fromkeys(present, _quantization(request.quantize, "diffusers", dtype))
    if request.quantize_text_encoder is not None:
        encoders = _quantization(request.quantize_text_encoder, "transformers", dtype)
        mapping |= dict.fromkeys(text_encoders(index), encoders)
    if mapping:
        arguments["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
    if "int4" in (request.quantize, request.quantize_text_encoder):
        arguments["device_map"] = device.type  # its weights are packed by the card
    return arguments


def _quantization(kind: str, library: str, dtype: Any) -> Any:
    """Return the quantisation of a name as diffusers or transformers takes it."""
    of: Any = importlib.import_module(library)
    if kind == "nf4":
        return of.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    import torchao.quantization as torchao  # pyright: ignore[reportMissingImports]

    return of.TorchAoConfig(getattr(torchao, TORCHAO[kind])(**(INT4 if kind == "int4" else {})))


def load_single_files(request: RunOptions, source: str, index: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Load the transformers of a request that come from single files, with the configs of ``source``."""
    return {
        component: _single_file(request, source, component, path, str(index[component][1]), dtype)
        for component, path in weight_files(request).items()
    }


def _single_file(request: RunOptions, source: str, component: str, path: Path, name: str, dtype: Any) -> Any:
    import diffusers

    config = None
    if path.suffix.lower() == GGUF:
        config = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    elif request.quantize is not None:
        config = _quantization(request.quantize, "diffusers", dtype)
    try:
        with quiet_diffusers():
            model = getattr(diffusers, name).from_single_file(
                str(path), config=source, subfolder=component, config_revision=request.revision,
                quantization_config=config, dtype=dtype,
            )  # fmt: skip
        reason = "it lacks layers" if any(weight.is_meta for weight in model.parameters()) else ""
    except (OSError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        model, reason = None, " ".join(str(error).split())[:200]
        reason = "it lacks layers" if "meta tensor" in reason else reason
    if reason:
        raise ConfigError(f"transformer {path} does not fit {name} of {source}: {reason}; give another")
    return model
