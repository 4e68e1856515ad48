"""LoRA files: where they may be, whether they fit a model, and loading several into a pipeline, each whole."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dit_accel.adapters.model_files import ModelFiles, read_config
from dit_accel.errors import ConfigError, MissingBackend, install

from .options import RunOptions
from .quiet import quiet_diffusers
from .weights import TRANSFORMERS, empty_model, split_component

FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for a LoRA in a folder."""

SECOND = "transformer_2"
"""The component of a pipeline of two transformers that denoises the low levels; a LoRA of it names it as its base."""


LEAST_PEFT = 0, 17
"""The peft that the extra ``finetune`` asks for."""


def require_peft() -> None:
    """Raise `MissingBackend` without peft, or with an older one than `LEAST_PEFT`."""
    try:
        installed = metadata.version("peft")
    except metadata.PackageNotFoundError:
        raise MissingBackend(f"a LoRA needs peft, which is not installed; {install('finetune')}") from None
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) < LEAST_PEFT:
        least = ".".join(map(str, LEAST_PEFT))
        raise MissingBackend(f"a LoRA needs peft {least} or newer, found {installed}; pip install --upgrade peft")


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA as it is requested."""

    name: str  # a file, its folder, or a hub id
    weight: float = 1.0  # by which its change is multiplied
    component: str | None = None  # the transformer that it is for; None: as the file says, else the first

    @classmethod
    def of(cls, text: str) -> "Lora":
        """Read ``[transformer_2:]FILE[=WEIGHT]``."""
        component, name = split_component(text)
        file, equals, weight = name.rpartition("=")
        if not equals or Path(name).exists():
            return cls(name, component=component)
        try:
            return cls(file, float(weight), component)
        except ValueError:
            raise ConfigError(f"lora {text} ends in no number, got {weight!r}; write its weight as FILE=0.8") from None


def check_lora(name: str) -> None:
    """Refuse a LoRA that can't be there, before anything is loaded."""
    require_peft()
    path = Path(name)
    if (file := lora_file(name)) is not None:
        if file.suffix != ".safetensors":
            raise ConfigError(f"the LoRA {name} is no safetensors file, and no other can be read safely; convert it")
        return
    if path.is_dir():
        raise ConfigError(f"the folder {name} holds no {FILE}; name the LoRA's file")
    if path.suffix or name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise ConfigError(f"there is no LoRA at {name}; give a .safetensors file, its folder, or a hub id (owner/name)")


def lora_file(name: str) -> Path | None:
    """Return the file of a LoRA in this file system; None for what may be a hub id."""
    path = Path(name)
    file = path / FILE if path.is_dir() else path
    return file if file.is_file() else None


def check_loras(request: RunOptions, pipeline: type, files: ModelFiles) -> None:
    """Refuse LoRAs that a pipeline's class, or its transformers, can't take; those of the hub are read as they load."""
    if request.fuse_lora and not request.lora:
        raise ConfigError("fuse_lora was requested, but no LoRA is given; name one by --lora, or leave it out")
    if request.lora and not hasattr(pipeline, "load_lora_weights"):
        raise ConfigError(f"{pipeline.__name__} takes no LoRA, got {', '.join(request.lora)}; leave it out")
    if request.fuse_lora and (request.quantize or request.transformer):
        raise ConfigError("fuse_lora adds to plain weights, and these may be quantised; leave it out")
    shapes: dict[str, Mapping[str, tuple[int, ...]]] = {}
    for lora in map(Lora.of, request.lora):
        file = lora_file(lora.name)
        component = lora.component or (
            _component_in(pipeline, str(file)) if file and files.has(SECOND) else TRANSFORMERS[0]
        )
        if not files.has(component):
            raise ConfigError(f"lora {lora.name} is for {component}, which {files.name} does not have; leave it out")
        if file is None:
            continue
        if component not in shapes:
            config = read_config(files.name, f"{component}/config.json", request.revision)
            shapes[component] = {name: tuple(w.shape) for name, w in empty_model(config).named_parameters()}
        matrices = _matrices(pipeline, lora.name, str(file), file.stat().st_mtime_ns)
        _check_shapes(lora.name, matrices, shapes[component], files.name)


@functools.lru_cache(maxsize=16)
def _matrices(pipeline: Any, name: str, file: str, changed: int) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of a LoRA's matrices, read once for all outputs of a run."""
    return {key: tuple(weight.shape) for key, weight in _state(pipeline, name, file).items()}


def _check_shapes(
    name: str, matrices: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], model: str
) -> None:
    """Refuse a LoRA that has layers which a transformer lacks, or of other widths."""
    wrong, count = list[str](), 0
    for key, shape in matrices.items():
        component, _, rest = key.partition(".")
        layer, matrix, _ = rest.partition(".lora_")
        if component not in TRANSFORMERS or not matrix:
            continue
        count += 1
        have, axis = shapes.get(f"{layer}.weight"), 1 if ".lora_A." in key else 0
        if have is None:
            wrong.append(f"{layer}, which is not there")
        elif len(shape) == len(have) == 2 and shape[axis] != have[axis]:
            wrong.append(f"{layer}, {shape[axis]:,} wide where the model's is {have[axis]:,}")
    if wrong:
        raise ConfigError(
            f"the LoRA {name} is of another model than {model}: {len(wrong)} of its {count} matrices do not fit, such "
            f"as that of {wrong[0]}; give another"
        )


def _state(pipeline: Any, name: str, file: str) -> Mapping[str, Any]:
    """Return a LoRA's weights under diffusers' names, into which a pipeline's class brings other trainers'."""
    try:
        with quiet_diffusers():
            state = pipeline.lora_state_dict(file, use_safetensors=True)
    except Exception as error:  # of converters of many trainers' files, each with errors of its own
        raise _misfit(name, pipeline, error) from None
    return state[0] if isinstance(state, tuple) else state


def _misfit(name: str, pipeline: type, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:200]
    return ConfigError(f"the LoRA {name} does not fit {pipeline.__name__}: {reason}; give another")


def load_loras(pipe: Any, requested: Sequence[str], *, fuse: bool = False) -> None:
    """Load LoRAs into a pipeline, with their weights; ``fuse`` adds them to the model's own weights."""
    loras = {f"lora_{place}": Lora.of(text) for place, text in enumerate(requested)}
    for adapter, lora in loras.items():
        load_lora(pipe, lora, adapter)
    if len(loras) > 1 or any(lora.weight != 1 for lora in loras.values()):
        pipe.set_adapters([*loras], [lora.weight for lora in loras.values()])
    if fuse:
        held = [name for name, part in pipe.components.items() if getattr(part, "peft_config", None)]
        pipe.fuse_lora(components=held, adapter_names=[*loras])
        pipe.unload_lora_weights()


def load_lora(pipe: Any, lora: Lora, adapter: str) -> None:
    """Load a LoRA into a pipeline under an adapter's name; `ConfigError` where a layer of it has no place there."""
    name, cls = str(lora_file(lora.name) or lora.name), type(pipe)
    wanted = _state(cls, lora.name, name)
    second = getattr(pipe, SECOND, None) is not None and (lora.component or _component_in(cls, name)) == SECOND
    into = {"load_into_transformer_2": True} if second else {}
    try:
        with quiet_diffusers():
            pipe.load_lora_weights(name, adapter_name=adapter, use_safetensors=True, **into)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise _misfit(lora.name, cls, error) from None
    requested = {key.partition(".lora_")[0] for key in wanted if ".lora_" in key}
    if second:
        requested = {f"{SECOND}.{key.partition('.')[2]}" for key in requested}
    modules = set()
    for component, part in pipe.components.items():
        named = part.named_modules() if hasattr(part, "named_modules") else ()
        modules |= {f"{component}.{name}" for name, layer in named if adapter in (getattr(layer, "lora_A", None) or ())}
    lost = sorted(requested - modules)
    if lost or not modules:
        what = "it has no layer"
        if lost:
            what = f"{len(lost)} of its {len(requested)} layers, such as {lost[0]}, are not there"
        raise ConfigError(f"the LoRA {lora.name} does not fit {cls.__name__}: {what}; give another")


def _component_in(pipeline: Any, name: str) -> str:
    """Return the transformer that a LoRA says it is of; diffusers takes the first."""
    text = pipeline.lora_state_dict(name, return_lora_metadata=True, use_safetensors=True)[1] or {}
    return SECOND if text.get("transformer.base_model_name_or_path") == SECOND else TRANSFORMERS[0]
