"""LoRA files, as diffusers writes them: where they may be, and loading one into a pipeline whole."""

import re
from importlib import metadata
from pathlib import Path
from typing import Any

from dit_accel.errors import ConfigError, MissingBackend, install

from .quiet import quiet_diffusers

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


def load_lora(pipe: Any, name: str) -> None:
    """Load a LoRA into a pipeline."""
    file = lora_file(name)
    try:
        with quiet_diffusers():
            wanted = pipe.lora_state_dict(str(file or name), use_safetensors=True)
            second = _is_of_second(pipe, str(file or name))
            pipe.load_lora_weights(
                str(file or name), use_safetensors=True, **({"load_into_transformer_2": True} if second else {})
            )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the LoRA {name} does not fit {type(pipe).__name__}: {reason}; give another") from None
    keys = wanted[0] if isinstance(wanted, tuple) else wanted
    requested = {key.partition(".lora_")[0] for key in keys if ".lora_" in key}
    if second:
        requested = {f"{SECOND}.{name.partition('.')[2]}" for name in requested}
    modules = set()
    for component, part in pipe.components.items():
        named = part.named_modules() if hasattr(part, "named_modules") else ()
        modules |= {f"{component}.{module}" for module, layer in named if getattr(layer, "lora_A", None)}
    lost = sorted(requested - modules)
    if lost or not modules:
        what = "it has no layer"
        if lost:
            what = f"{len(lost)} of its {len(requested)} layers, such as {lost[0]}, are not there"
        raise ConfigError(f"the LoRA {name} does not fit {type(pipe).__name__}: {what}; give another")


def _is_of_second(pipe: Any, name: str) -> bool:
    """Tell whether a LoRA says that it is of the second of a pipeline's two transformers; diffusers takes the first."""
    if getattr(pipe, SECOND, None) is None:
        return False
    text = pipe.lora_state_dict(name, return_lora_metadata=True, use_safetensors=True)[1] or {}
    return text.get("transformer.base_model_name_or_path") == SECOND
