"""What a user may call a model by, and its config files, local or on the hub: all that a plan needs of a model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnsupportedModel, did_you_mean, install
from ..files import read_text
from .adapter import Adapter, Family
from .embedded import assets, embedded_at, embedded_names
from .installed import adapter_for

INDEX = "model_index.json"


def model_source(name: str) -> str:
    """Return what diffusers loads for a model's name: a folder or a hub id; `ConfigError` for what is neither."""
    known = embedded_names()
    if name in known:
        return str(assets().model_path(name))
    if "/" not in name and not Path(name).is_dir():
        problem = f"{name!r} is no embedded model; {did_you_mean(name, known)};"
        if not known:
            problem = f"there is no {name!r} here, and no embedded models are installed; {install('assets')} for them,"
        raise ConfigError(f"{problem} or name a folder of a diffusers pipeline, or a hub id (owner/name)")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """The configs of a diffusers pipeline."""

    name: str  # the folder or hub id that was requested
    index: Mapping[str, Any]  # model_index.json, component name -> (library, class)
    transformer: Mapping[str, Any]  # config of the transformer
    vae: Mapping[str, Any]  # config of the autoencoder; empty where the pipeline has none

    def has(self, component: str) -> bool:
        """Tell whether the pipeline holds a component."""
        entry = self.index.get(component)
        return isinstance(entry, (list, tuple)) and entry[0] is not None

    def identify(self) -> tuple[Adapter, Family]:
        """Return the adapter and the sizes, a released family's or the configs'; `UnsupportedModel` without either."""
        adapter = adapter_for(str(self.transformer.get("_class_name")))
        experts = 1 + self.has("transformer_2")
        repo = f"embedded/{name}" if (name := embedded_at(self.name)) else self.name
        family = next((known for known in adapter.families if known.repo == repo), None)
        family = family or adapter.family(self.transformer, experts)
        return adapter, self._with_sizes(adapter, family, experts)

    def _with_sizes(self, adapter: Adapter, family: Family | None, experts: int) -> Family:
        if not adapter.families:
            raise UnsupportedModel(f"{self.name} is of {adapter.name}, whose sizes are not known; plan with --family")
        base = family or adapter.families[0]
        try:
            read = adapter.sizes(self.transformer)
            sizes: dict[str, Any] = {"layers": read.layers, "heads": read.heads, "head_dim": read.head_dim}
            for name, entry in (("ffn_dim", "ffn_dim"), ("patch", "patch_size")):
                sizes[name] = getattr(read, name) or (family and getattr(family, name))
                if sizes[name] is None:
                    raise KeyError(entry)
        except KeyError as error:
            raise UnsupportedModel(
                f"the transformer config of {self.name} has no {error.args[0]!r}; plan with --family instead"
            ) from None
        time, space = base.vae
        vae = self.vae.get("scale_factor_temporal") or time, self.vae.get("scale_factor_spatial") or space
        if family is None:  # what the first family was trained on says nothing of this model
            sizes |= {"name": adapter.name, "recipes": adapter.recipes, "experts": experts}
            sizes |= {"trained_frames": None, "trained_size": None}
        return replace(base, repo=self.name, vae=vae, **sizes)


def read_model_files(model: str, revision: str | None = None) -> ModelFiles:
    """Read the configs of a pipeline, a folder or a hub id, no weights; `UnsupportedModel` without a transformer."""
    index = read_config(model, INDEX, revision)
    if not isinstance(index.get("transformer"), list):
        parts = ", ".join(name for name, entry in index.items() if isinstance(entry, list)) or "no component"
        raise UnsupportedModel(f"{model} holds {parts} but no transformer; give a diffusers pipeline that has one")
    return ModelFiles(
        name=model,
        index=index,
        transformer=read_config(model, "transformer/config.json", revision),
        vae=read_config(model, "vae/config.json", revision) if "vae" in index else {},
    )


def read_config(model: str, file: str, revision: str | None = None) -> dict[str, Any]:
    """Read one JSON file of a model, such as ``transformer/config.json``; `UnsupportedModel` if it is not there.

    ``revision``: branch, tag or commit of a hub id; None: the main branch.
    """
    path = Path(model) / file
    if not path.is_file():
        if Path(model).exists() or not _is_hub_id(model):
            state = f"has no {file}" if Path(model).exists() else "is neither a folder nor a hub id (owner/name)"
            raise UnsupportedModel(f"model {model!r} {state}; give a folder saved by a diffusers pipeline, or a hub id")
        path = _download(model, file, revision)
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{file} of model {model!r} can't be read: {error}") from None


def _is_hub_id(model: str) -> bool:
    owner, slash, name = model.partition("/")
    return bool(owner and slash and name) and "/" not in name and not model.startswith((".", "~"))


def _download(model: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        # a download would try for half a minute without a network
        get_hf_file_metadata(hf_hub_url(model, file, revision=revision))
        return Path(hf_hub_download(model, file, revision=revision))
    except Exception as error:  # the errors of the hub client's transport change from release to release
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(
            f"model {model!r} is not a local folder, and the hub gave no {file} ({type(error).__name__}: {reason}); "
            "check the name, the connection, or `hf auth login` for a gated model"
        ) from None
