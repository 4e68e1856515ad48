"""Weights in fewer bits, or from a single file: what a request names is checked before anything is loaded."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.adapters.model_files import ModelFiles
from dit_accel.errors import ConfigError, MissingBackend, install

from .quiet import quiet_diffusers

if TYPE_CHECKING:
    from .request import Request

TRANSFORMERS = ("transformer", "transformer_2")
"""The components of a pipeline that denoise."""

TORCHAO = {
    "fp8": "Float8DynamicActivationFloat8WeightConfig", "int8": "Int8DynamicActivationInt8WeightConfig",
    "fp8-weights": "Float8WeightOnlyConfig", "int8-weights": "Int8WeightOnlyConfig", "int4": "Int4WeightOnlyConfig",
}  # fmt: skip
"""Name -> torchao's config; nf4 is that of bitsandbytes."""

INT4 = {"group_size": 128, "int4_packing_format": "tile_packed_to_4d"}  # the packing that needs no further library

FILES = (".safetensors", ".gguf")
"""Suffixes of files that hold a transformer's weights."""

GGUF = ".gguf"


def split_component(text: str) -> tuple[str | None, str]:
    """Split ``transformer_2:FILE`` into the component and the file; None where no component is named."""
    component, colon, rest = text.partition(":")
    return (component, rest) if colon and component in TRANSFORMERS else (None, text)


def weight_files(request: "Request") -> dict[str, Path]:
    """Return the single files of a request: component -> file; `ConfigError` for two of one component."""
    files: dict[str, Path] = {}
    for text in request.transformer:
        component, name = split_component(text)
        if (component or TRANSFORMERS[0]) in files:
            raise ConfigError(
                f"transformer {text} is a second file of {component or TRANSFORMERS[0]}; the file of the second of two "
                "experts is named as transformer_2:FILE"
            )
        files[component or TRANSFORMERS[0]] = Path(name)
    return files


def check_files(request: "Request") -> None:
    """Refuse single files that are not there, or that diffusers can't read safely."""
    for path in weight_files(request).values():
        if path.suffix.lower() not in FILES:
            raise ConfigError(f"transformer {path} is no .safetensors or .gguf file; convert it, or name another")
        if not path.is_file():
            raise ConfigError(f"there is no file at transformer {path}; give a .safetensors or .gguf file")
        if path.suffix.lower() == GGUF:
            _require("gguf", "a .gguf file")
            if request.quantize is not None:
                raise ConfigError(f"quantize {request.quantize!r} would quantise {path} again; leave one of them out")


def named_by_file(request: "Request") -> tuple["Request", list[str]]:
    """Return a request whose ``model`` is a single file as one of the model that diffusers knows for it, and a note.

    Raises:
        ConfigError: for a file that diffusers can't tell.
    """
    path = Path(request.model or "")
    if path.suffix.lower() not in FILES or not path.is_file():
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
        from gguf import GGUFReader

        return {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in GGUFReader(path).tensors}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} can't be read as a safetensors file ({error}); give another") from None


def check_model(request: "Request", files: ModelFiles) -> None:
    """Refuse weights that a model's classes can't take: already quantised, without text encoder, or no single file."""
    import diffusers

    if request.quantize is not None and files.transformer.get("quantization_config"):
        raise ConfigError(
            f"quantize {request.quantize!r} goes with plain weights, and {files.name} is quantised already"
        )
    if request.revision is not None and Path(files.name).exists():
        raise ConfigError(f"revision {request.revision!r} is of a hub id, and {files.name} is a folder; leave it out")
    if request.quantize_text_encoder is not None and not text_encoders(files.index):
        raise ConfigError(
            f"quantize_text_encoder {request.quantize_text_encoder!r} needs a text encoder, and {files.name} has none; "
            "leave it out"
        )
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
    return [
        name for name, entry in index.items()
        if name.startswith("text_encoder") and isinstance(entry, (list, tuple)) and entry[0] == "transformers"
    ]  # fmt: skip


def check_quantized(request: "Request", device: Any, dtype: str) -> None:
    """Refuse, by its name, a quantisation that needs another device, number format or a library that is missing."""
    for option in ("quantize", "quantize_text_encoder"):
        kind = getattr(request, option)
        if kind is None:
            continue
        _require("bitsandbytes" if kind == "nf4" else "torchao", f"{option} {kind!r}")
        least = {"fp8": (8, 9), "int4": (8, 0)}.get(kind)
        if device.type == "cpu" and (least or kind == "nf4"):
            able = "int8, int8-weights and fp8-weights run on a CPU too"
            raise ConfigError(f"{option} {kind!r} needs a card, got device {device}; {able}")
        if least and device.type == "cuda" and not _is_amd() and _capability(device) < least:
            have, needs = (".".join(map(str, version)) for version in (_capability(device), least))
            raise ConfigError(
                f"{option} {kind!r} needs a card of compute capability {needs}, got {have}; take int8 or int8-weights"
            )
        if kind == "int4" and dtype != "bfloat16":
            raise ConfigError(f"{option} 'int4' computes in bfloat16 alone, got dtype {dtype}; take --dtype bfloat16")


def _capability(device: Any) -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability(device)


def _is_amd() -> bool:
    import torch

    return torch.version.hip is not None


def _require(library: str, what: str) -> None:
    """Raise `MissingBackend` without a library of weights in fewer bits."""
    import importlib.util

    if importlib.util.find_spec(library) is None:
        raise MissingBackend(f"{what} needs {library}, which is not installed; {install('quantize')}")


def slow_products(request: "Request") -> list[str]:
    """Return a warning for products in 8 bits whose blocks are not compiled."""
    if request.quantize not in ("int8", "fp8") or request.compile:
        return []
    return [
        f"quantize {request.quantize!r} is quick in compiled blocks alone, as with --compile; without them "
        f"{request.quantize}-weights takes as little memory and less time"
    ]


def load_arguments(request: "Request", index: Mapping[str, Any], dtype: Any, device: Any) -> dict[str, Any]:
    """Return what `from_pretrained` of a pipeline takes for a request's weights, single files loaded.

    ``index``: the pipeline's ``model_index.json``; ``dtype``: the transformer's torch dtype.
    """
    from diffusers import PipelineQuantizationConfig

    arguments: dict[str, Any] = {
        name: getattr(request, name) for name in ("variant", "revision") if getattr(request, name) is not None
    }
    files, mapping = weight_files(request), {}
    for name in TRANSFORMERS:
        if name in files:
            arguments[name] = _single_file(request, name, files[name], str(index[name][1]), dtype)
        elif request.quantize is not None and isinstance(index.get(name), list) and index[name][0]:
            mapping[name] = _config(request.quantize, "diffusers", dtype)
    if request.quantize_text_encoder is not None:
        mapping |= dict.fromkeys(text_encoders(index), _config(request.quantize_text_encoder, "transformers", dtype))
    if mapping:
        arguments["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
    if "int4" in (request.quantize, request.quantize_text_encoder):
        arguments["device_map"] = device.type  # its weights are packed by the card
    return arguments


def _config(kind: str, library: str, dtype: Any) -> Any:
    """Return the quantisation of a name as diffusers or transformers takes it."""
    import diffusers
    import transformers

    of: Any = {"diffusers": diffusers, "transformers": transformers}[library]
    if kind == "nf4":
        return of.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    import torchao.quantization as torchao

    make: Callable[..., Any] = getattr(torchao, TORCHAO[kind])
    return of.TorchAoConfig(make(**(INT4 if kind == "int4" else {})))


def _single_file(request: "Request", component: str, path: Path, class_name: str, dtype: Any) -> Any:
    """Load a transformer from a single file, with the config of the request's model."""
    import diffusers

    config = None
    if path.suffix.lower() == GGUF:
        config = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    elif request.quantize is not None:
        config = _config(request.quantize, "diffusers", dtype)
    reason = "it lacks layers"
    try:
        with quiet_diffusers():
            model = getattr(diffusers, class_name).from_single_file(
                str(path), config=request.source, subfolder=component, config_revision=request.revision,
                quantization_config=config, dtype=dtype,
            )  # fmt: skip
        lacking = [name for name, weight in model.named_parameters() if weight.is_meta]
    except (OSError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        lacking = ["?"]
        reason = "it lacks layers" if "meta tensor" in str(error) else re.sub(r"\s+", " ", str(error))[:200]
    if lacking:
        raise ConfigError(f"transformer {path} does not fit {class_name} of {request.source}: {reason}; give another")
    return model
