"""The `dit-accel` application: its commands, and how errors become one line and an exit code."""

import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import registry
from ..errors import DitAccelError
from .console import print_error
from .lists import methods, models
from .method_options import with_method_options
from .plan import plan

BUILT_IN: dict[str, Callable[..., Any]] = {"plan": plan, "methods": methods, "models": models}
EPILOG = "Exit codes: 0 done, 1 failed while running, 2 bad input, 130 stopped by Ctrl-C."


class CommandGroup(TyperGroup):
    """The built-in commands and those of installed packages, each built when it is asked for."""

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
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except BaseException as error:
            if _traceback_wanted:
                traceback.print_exc()
            code = _exit_code(error)
            if code is None:
                raise
        sys.exit(code if isinstance(code, int) else 0)


_traceback_wanted: list[bool] = []


def _exit_code(error: BaseException) -> int | None:
    """Print one line on an error and return its exit code; None for what is no business of ours."""
    usage = getattr(error, "format_message", None)
    if usage is not None and "NoArgsIsHelp" in type(error).__name__:
        print(usage())
        return 2
    if usage is not None:
        print_error(usage())
        return int(getattr(error, "exit_code", 2))
    if isinstance(error, DitAccelError):
        print_error(str(error))
        return 2
    if isinstance(error, KeyboardInterrupt):
        print_error("stopped by Ctrl-C; nothing half-written is left")
        return 130
    if isinstance(error, Exception) and not isinstance(error, BrokenPipeError):
        print_error(f"{type(error).__name__}: {error} (dit-accel --traceback COMMAND ... shows where)")
        return 1
    return None


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
    show_traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make diffusers' video and image transformers faster, without retraining."""
    _traceback_wanted[:] = [True] if show_traceback else []


def main() -> None:
    """Run the command line; the entry point of the `dit-accel` script."""
    sys.exit(app())
