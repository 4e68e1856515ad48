"""The `dit-accel` application: its commands, and how errors become one line and an exit code."""

import contextlib
import copy
import functools
import inspect
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import ConfigError, DitAccelError, did_you_mean
from ..files import no_room
from . import installed_commands
from .console import TALK, flush, print_error, warn
from .method_options import with_method_options
from .stopping import STOP, leave, watch

BUILT_IN = {
    "recommend": (".recommend", "List what could be attached to a model at a size: speed-up, loss, memory."),
    "plan": (".plan", "Estimate density, FLOPs, memory and speed-up of a run; loads no weights."),
    "methods": (".lists", "List the methods and what each does; with --options, or named, what can be set."),
    "models": (".lists", "List the models that are known by name, and which methods each family takes."),
    "doctor": (".doctor", "Check and time the attention kernels on this machine; say what would make it faster."),
}
"""Name of a built-in command -> its module, which loads torch, and its line in the help, which then need not."""

BY_USE = (
    "generate", "recommend", "describe", "plan", "methods", "models", "doctor", "ui", "serve", "eval", "tune",
    "finetune", "bench",
)  # fmt: skip
"""The order of the commands in the help; those of other packages follow."""

INTERRUPTED = 130

EPILOG = (
    "Exit codes: 0 done, 1 failed while running, 2 bad input or a full disk, 130 stopped by Ctrl-C, 143 stopped by "
    "SIGTERM."
)


LIBRARIES = ("torchao", "bitsandbytes", "torch.utils._pytree")
"""Loggers that say at import which of a library's own parts can't be loaded; what a run needs is checked by name."""


@contextlib.contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Show Python's warnings as the command line's own inside the block, without file names and source lines."""
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        warn(" ".join(str(message).split()))

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


class _PlainFlags:
    """A command whose help shows no word such as <bool> behind flags, which take no value."""

    def get_params(self, ctx: typer.Context) -> list[Any]:
        """Return the parameters, --help among them."""
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class OneCommand(_PlainFlags, TyperCommand):  # type: ignore[misc]
    """A command of `dit-accel`."""


class SubGroup(_PlainFlags, TyperGroup):  # type: ignore[misc]
    """A group of commands below `dit-accel`, such as `eval`."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        """Return a command of the group; refuse an unknown one with the nearest known name."""
        names = self.list_commands(ctx)  # type: ignore[arg-type]
        if args[0] not in names:
            raise ConfigError(f"{ctx.info_name} has no command {args[0]!r}; {did_you_mean(args[0], names)}")
        return super().resolve_command(ctx, args)  # type: ignore[arg-type]


class CommandGroup(_PlainFlags, TyperGroup):  # type: ignore[misc]
    """The built-in commands and those of installed packages, each built when it is requested."""

    show_traceback = False

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Return the names in the order of the help."""
        return _names()

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        """Return a command that has nothing but its line in the list; that loads no method."""
        return _listed(cmd_name)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        """Return the whole command for a run; refuse an unknown one with the nearest known name."""
        if args[0] not in _names():
            raise ConfigError(f"there is no command {args[0]!r}; {did_you_mean(args[0], _names())}")
        name, _, rest = super().resolve_command(ctx, args)  # type: ignore[misc]
        return name, _build(str(name)), rest

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run the command line; an error becomes one line on stderr and an exit code."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        self.show_traceback = False
        run = functools.partial(super().main, *args, standalone_mode=False, **extra)
        sys.exit(_outcome(run, lambda: self.show_traceback))


def _outcome(run: Callable[[], Any], show_traceback: Callable[[], bool]) -> int:
    """Run a command and return its exit code; an error, or a signal that stops it, is one line on stderr."""
    STOP.raises = True
    try:
        with warnings_in_one_line():
            code = run()
            flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        code = INTERRUPTED if STOP.number else _exit_code(error, show_traceback())
    finally:
        STOP.raises = False
    if STOP.number:  # Python's own end takes seconds with torch
        leave()
    if code == INTERRUPTED:
        TALK.show_cursor()
        print_error(f"stopped by Ctrl-C; {STOP.files}")
    return code if isinstance(code, int) else 0


def _exit_code(error: Exception, show_traceback: bool) -> int:
    """Print an error as one line and return its exit code."""
    if show_traceback:
        traceback.print_exception(error)
    if no_room(error) and not isinstance(error, DitAccelError):
        error = ConfigError(f"there is no space left on the disk: {error}; free some, and run the same again")
    usage = getattr(error, "format_message", None)  # Typer's own errors of usage
    if usage is None and not isinstance(error, DitAccelError):
        print_error(f"{type(error).__name__}: {error} (--traceback shows where)")
        return 1
    if "NoArgsIsHelp" in type(error).__name__:
        print(usage() if usage else "")
    else:
        print_error(usage() if usage else str(error))
    return 2


def _names() -> list[str]:
    known = {**installed_commands.commands(), **BUILT_IN}
    return [*(name for name in BY_USE if name in known), *(name for name in known if name not in BY_USE)]


def _function(name: str) -> Callable[..., Any]:
    if name not in BUILT_IN:
        return installed_commands.commands()[name]
    return getattr(import_module(BUILT_IN[name][0], __package__), name)


def _listed(name: str) -> Any:
    """Return a command with nothing but its line in the help, None for an unknown name."""
    if name not in _names():
        return None
    if name in BUILT_IN:
        line: Any = BUILT_IN[name][1]
    else:
        function = installed_commands.commands()[name]
        line = function.info.help if isinstance(function, typer.Typer) else inspect.getdoc(function)
    listed = typer.Typer(add_completion=False)
    listed.command(name, help=line)(lambda: None)
    return typer.main.get_command(listed)


def _build(name: str) -> Any:
    """Return a command or group with its method switches."""
    function = _function(name)
    if isinstance(function, typer.Typer):
        return typer.main.get_group(_wrapped(name, function))
    single = typer.Typer(add_completion=False)
    single.command(name, cls=OneCommand)(_with_traceback(with_method_options(function)))
    return typer.main.get_command(single)


def _wrapped(name: str, group: typer.Typer) -> typer.Typer:
    """Return a group whose commands, and those of groups inside it, have method options and --traceback as ours do."""
    wrapped = typer.Typer(cls=SubGroup, name=name, help=group.info.help, no_args_is_help=True, add_completion=False)
    wrapped.registered_callback = group.registered_callback
    for command in group.registered_commands:
        assert command.callback is not None
        whole = copy.copy(command)  # the original stays as its owner made it
        whole.callback, whole.cls = _with_traceback(with_method_options(command.callback)), OneCommand
        wrapped.registered_commands.append(whole)
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        inner_name = str(inner.name or inner.typer_instance.info.name)
        wrapped.add_typer(_wrapped(inner_name, inner.typer_instance))
    return wrapped


def _ask_for_traceback(ctx: typer.Context, wanted: bool) -> None:
    group: Any = ctx.find_root().command
    group.show_traceback = wanted or group.show_traceback


Traceback = Annotated[
    bool,
    typer.Option("--traceback", callback=_ask_for_traceback, is_eager=True, help="Show the traceback of an error."),
]


def _with_traceback(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``command`` with --traceback, so that it works after the command's name as before it."""
    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("show_traceback", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Traceback)

    @functools.wraps(command)
    def run(*, show_traceback: bool = False, **arguments: Any) -> Any:
        return command(**arguments)

    parameters = [*signature.parameters.values(), option]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


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
    show_traceback: Traceback = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make diffusers' video and image transformers faster, without retraining."""


def main() -> None:
    """Run the command line; the entry point of the `dit-accel` script."""
    watch()
    app()


def run_alone(command: Callable[..., Any]) -> None:
    """Run one function as a program of its own, with the options, errors, signals and exit codes of a command."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command()(_with_traceback(command))
    built: Any = typer.main.get_command(single)
    built.show_traceback = False
    run = functools.partial(built.main, standalone_mode=False)
    watch()
    sys.exit(_outcome(run, lambda: built.show_traceback))
