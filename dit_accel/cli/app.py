"""The `dit-accel` application: its commands, and how errors become one line and an exit code."""

import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import DitAccelError
from . import registry
from .console import print_error
from .lists import methods, models
from .method_options import with_method_options
from .plan import plan

BUILT_IN: dict[str, Callable[..., Any]] = {"plan": plan, "methods": methods, "models": models}
INTERRUPTED = 130
EPILOG = "Exit codes: 0 done, 1 failed while running, 2 bad input, 130 stopped by Ctrl-C."


class CommandGroup(TyperGroup):
    """The built-in commands and those of installed packages, each built when it is asked for."""

    show_traceback = False

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Return the names in the order of the help."""
        return list(_functions())

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        """Return a command without its method switches: enough for the list, and it loads no method."""
        return _build(cmd_name, switches=False)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        """Return the whole command for a run."""
        name, _, rest = super().resolve_command(ctx, args)  # type: ignore[misc]
        return name, _build(str(name), switches=True), rest

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run the command line; an error becomes one line on stderr and an exit code."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        self.show_traceback = False
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except Exception as error:
            if self.show_traceback:
                traceback.print_exc()
            code = _exit_code(error)
        if code == INTERRUPTED:
            print_error("stopped by Ctrl-C; nothing half-written is left")
        sys.exit(code if isinstance(code, int) else 0)


def _exit_code(error: Exception) -> int:
    """Print one line on an error and return its exit code."""
    usage = getattr(error, "format_message", None)  # Typer's own errors of usage
    if usage is None and not isinstance(error, DitAccelError):
        print_error(f"{type(error).__name__}: {error} (dit-accel --traceback COMMAND ... shows where)")
        return 1
    if "NoArgsIsHelp" in type(error).__name__:
        print(usage() if usage else "")
    else:
        print_error(usage() if usage else str(error))
    return 2


def _functions() -> dict[str, Callable[..., Any]]:
    added = registry.commands()
    return {**added, **BUILT_IN}


def _build(name: str, *, switches: bool) -> Any:
    function = _functions().get(name)
    if function is None:
        return None
    single = typer.Typer(add_completion=False)
    single.command(name)(with_method_options(function, switches))
    return typer.main.get_command(single)


app = typer.Typer(
    cls=CommandGroup,
    name="dit-accel",
    help="Make diffusers' video and image transformers faster, without retraining.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dit-accel {version('dit-accel')}")
        raise typer.Exit


@app.callback()
def start(
    ctx: typer.Context,
    show_traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make diffusers' video and image transformers faster, without retraining."""
    ctx.command.show_traceback = show_traceback  # type: ignore[attr-defined]


def main() -> None:
    """Run the command line; the entry point of the `dit-accel` script."""
    sys.exit(app())
