"""The command `serve`: prints what starts an existing server with our plugin and settings, and checks them."""

import os
import shlex
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from dit_accel.cli.console import TALK, warn
from dit_accel.errors import ConfigError, did_you_mean
from dit_accel.serving.settings import VARIABLE, ServerSetting, read_setting

from .options import option

if TYPE_CHECKING:
    from dit_accel.methods.config import MethodConfig

PLUGIN = "dit_accel"
"""The name of our entry point among a server's plugins."""


class Engine(NamedTuple):
    """A server whose diffusers backend our plugin acts on."""

    plugins: str  # the group of entry points that it loads
    allowed: str  # the variable that lists which plugins it loads; all where it is unset
    command: str  # how it is started


ENGINES = {
    "vllm-omni": Engine(
        "vllm_omni.general_plugins", "VLLM_PLUGINS", "vllm serve {} --omni --diffusion-load-format diffusers"
    ),
    "sglang": Engine(
        "sglang.multimodal_gen.plugins", "SGLANG_PLUGINS", "sglang serve --model-path {} --backend diffusers"
    ),
}
"""Name of a server, which is its distribution's -> how it is started."""


def print_server(
    model: Annotated[str, typer.Argument(help="A hub id or a folder.")],
    engine: Annotated[str, option("vllm-omni or sglang.", metavar="NAME")] = "vllm-omni",
    setting: Annotated[
        str, option("What is attached: careful, balanced, fast, none, or a TOML file of methods.", metavar="SETTING")
    ] = "balanced",
) -> None:
    """Print the command that starts a server with these methods; it starts none.

    Checks that the model takes the methods, that the server and the plugin are
    installed, and that the server is not told to leave the plugin out. What is
    missing is a line each, and exit code 1.

    \b
    Examples:
      dit-accel serve Wan-AI/Wan2.1-T2V-14B-Diffusers --engine sglang
      dit-accel serve ./my-wan --engine vllm-omni --setting fast.toml
    """
    if engine not in ENGINES:
        raise ConfigError(f"there is no engine {engine!r}; {did_you_mean(engine, ENGINES)}")
    source, methods = _checked(model, read_setting(setting))
    found = str(Path(setting).expanduser().resolve()) if setting.endswith(".toml") else setting
    print(f"{VARIABLE}={shlex.quote(found)} {ENGINES[engine].command.format(shlex.quote(source))}")
    names = ", ".join(method.name for method in methods) or "nothing, as no method of the preset is for this model"
    TALK.print(f"attaches {names}", markup=False, soft_wrap=True)
    missing = list(_missing(engine, os.environ))
    for text in missing:
        warn(text)
    raise typer.Exit(1 if missing else 0)


def _checked(model: str, setting: ServerSetting) -> tuple[str, "list[MethodConfig]"]:
    """Return what a server loads and what is attached to it; refuse methods that this model can't take."""
    from dit_accel.adapters.model_files import model_source, read_model_files
    from dit_accel.adapters.versions import require_versions
    from dit_accel.methods.base import Model as MethodsModel
    from dit_accel.methods.compose import make_handlers
    from dit_accel.methods.presets import preset_methods

    require_versions()
    files = read_model_files(model_source(model))
    adapter, family = files.identify()
    sizes = MethodsModel(
        adapter=adapter, family=family, heads=family.heads, layers=family.layers, config=files.transformer
    )
    methods = [*setting.methods, *preset_methods(setting.preset, sizes, setting.methods).configs]
    make_handlers(methods, sizes)
    return files.name, methods


def _missing(name: str, environ: Mapping[str, str]) -> Iterator[str]:
    """Give a line for each thing without which the printed command would not do what it says."""
    engine = ENGINES[name]
    try:
        version(name)
    except PackageNotFoundError:
        yield f"{name} is not installed here; install it, then dit-accel with --no-deps, since it pins diffusers"
    if not entry_points(group=engine.plugins, name=PLUGIN):
        yield f"the plugin {PLUGIN} is not registered for {name}; install dit-accel beside it"
    allowed = environ.get(engine.allowed)
    if allowed is not None and PLUGIN not in allowed.split(","):
        yield f"{engine.allowed}={allowed} leaves the plugin out; add {PLUGIN} to it, or unset it"
