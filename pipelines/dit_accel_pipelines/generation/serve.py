"""The command `serve`: prints what starts an existing server with our plugin and settings, and checks them."""

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dit_accel.cli.console import TALK, warn
from dit_accel.errors import ConfigError
from dit_accel.serving.settings import VARIABLE, ServerSetting, read_setting

from .options import option
from .ranges import check_choices

if TYPE_CHECKING:
    from dit_accel.methods.config import MethodConfig

PLUGIN = "dit_accel"
"""The name of our entry point among a server's plugins."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A server whose diffusers backend our plugin acts on."""

    package: str  # its distribution
    plugins: str  # the group of entry points that it loads
    allowed: str  # the variable that lists which plugins it loads; all where it is unset
    command: tuple[str, ...]  # how it is started, the model's name behind


ENGINES = {
    "vllm-omni": Engine(
        "vllm-omni", "vllm_omni.general_plugins", "VLLM_PLUGINS",
        ("vllm", "serve", "--omni", "--diffusion-load-format", "diffusers"),
    ),
    "sglang": Engine(
        "sglang", "sglang.multimodal_gen.plugins", "SGLANG_PLUGINS",
        ("sglang", "serve", "--backend", "diffusers", "--model-path"),
    ),
}  # fmt: skip
"""Name of a server -> how it is started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What `serve` is given."""

    engine: str
    preset: str | None = None
    config: Path | None = None

    def __post_init__(self) -> None:
        check_choices(self, {"engine": tuple(ENGINES)})
        if self.preset is not None and self.config is not None:
            raise ConfigError(
                f"serve takes --preset or --config, got {self.preset} and {self.config}; give one of them"
            )

    @property
    def setting(self) -> str:
        """Return what the plugin reads: a preset's name, or the path of a file from wherever the server starts."""
        return str(self.config.expanduser().resolve()) if self.config else self.preset or "balanced"


def print_server(
    model: Annotated[str, typer.Argument(help="A hub id or a folder.")],
    engine: Annotated[str, option("vllm-omni or sglang.", metavar="NAME")] = "vllm-omni",
    preset: Annotated[
        str | None, option("What is attached: careful, balanced (the default), fast or none.", metavar="LEVEL")
    ] = None,
    config: Annotated[Path | None, option("The same, as a TOML file of methods.", metavar="FILE")] = None,
) -> None:
    """Print the command that starts a server with these methods; it starts none.

    Checks that the model takes the methods, that the server and the plugin are
    installed, and that the server is not told to leave the plugin out. What is
    missing is a line each, and exit code 1.

    Examples:

    dit-accel serve Wan-AI/Wan2.1-T2V-14B-Diffusers --engine sglang

    dit-accel serve ./my-wan --engine vllm-omni --config fast.toml
    """
    options = ServeOptions(engine=engine, preset=preset, config=config)
    source, methods = _checked(model, read_setting(options.setting))
    print(command_line(options, source))
    names = ", ".join(method.name for method in methods) or "nothing, as no method of the preset is for this model"
    TALK.print(f"attaches {names}", markup=False, soft_wrap=True)
    missing = list(_missing(ENGINES[engine], os.environ))
    for text in missing:
        warn(text)
    raise typer.Exit(1 if missing else 0)


def command_line(options: ServeOptions, source: str) -> str:
    """Return the line of a shell that starts the server on a model."""
    words = list(ENGINES[options.engine].command)
    words.insert(2 if options.engine == "vllm-omni" else len(words), source)
    return shlex.join([f"{VARIABLE}={options.setting}", *words])


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


def _missing(engine: Engine, environ: Mapping[str, str]) -> Iterator[str]:
    """Give a line for each thing without which the printed command would not do what it says."""
    try:
        version(engine.package)
    except PackageNotFoundError:
        yield (
            f"{engine.package} is not installed here; pip install {engine.package}, and dit-accel with --no-deps "
            "beside it, since it pins an older diffusers"
        )
    if not entry_points(group=engine.plugins, name=PLUGIN):
        yield f"the plugin {PLUGIN} is not registered for {engine.package}; pip install dit-accel beside it"
    allowed = environ.get(engine.allowed)
    if allowed is not None and PLUGIN not in allowed.split(","):
        yield f"{engine.allowed}={allowed} leaves the plugin out; add {PLUGIN} to it, or unset it"
