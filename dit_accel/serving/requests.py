"""A server's pipeline: what is attached when it is loaded, and each request through it."""

import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar

from torch.nn import Module

from ..attachment.attachment import Attachment, attach, attachment_of
from ..errors import DitAccelError
from ..methods.find import components_of, find_transformers
from .settings import read_setting, requested

LOGGER = logging.getLogger("dit_accel.serving")

Result = TypeVar("Result")

_ONE_AT_A_TIME: "weakref.WeakKeyDictionary[Any, threading.RLock]" = weakref.WeakKeyDictionary()
"""Transformer to which a server attached -> what requests of any pipeline around it hold while they run."""

_BENEATH = ("torch", "triton", "threading", "contextlib", "functools")
"""Packages in which an error may begin that is still the caller's."""


def attach_requested(pipe: Any, setting: str | None = None, logger: logging.Logger = LOGGER) -> Attachment | None:
    """Attach to a pipeline what its server asks for; log one line, and on any error leave the pipeline plain.

    ``setting``: as `read_setting` takes it. None: the text of the environment variable ``DIT_ACCEL``.

    Returns:
        The attachment; None where nothing was requested or it was refused.
    """
    text = requested() if setting is None else setting
    if not text:
        return None
    try:
        wanted = read_setting(text)
        if wanted.empty:
            return None
        attachment = attach(pipe, *wanted.methods, preset=wanted.preset)
    except Exception as error:  # a server goes on without us
        logger.warning("dit-accel: not attached to %s: %s", type(pipe).__name__, _line(error))
        return None
    lock = threading.RLock()
    _ONE_AT_A_TIME.update(dict.fromkeys(find_transformers(pipe).values(), lock))
    beside = f"; {attachment.preset}" if attachment.preset else ""
    beside += f"; requests say {', '.join(wanted.run)} for themselves" if wanted.run else ""
    logger.info("dit-accel: %s of %s%s", attachment, text, beside)
    return attachment


def answer(
    pipe: Any, run: Callable[[], Result], generators: Iterable[Any] = (), logger: logging.Logger = LOGGER
) -> Result:
    """Run one request through a pipeline and log what its methods did; of several threads one after the other.

    What the methods carry from step to step is freed behind it, also where the request failed or was cancelled.
    Where the methods themselves fail the reason is logged, and the request runs again without them.

    Args:
        pipe: the pipeline that `attach_requested` was given, or another around its transformer, which has its methods;
            of any other one the request just runs.
        run: calls the pipeline once and returns what the server wants of it; it may be called a second time.
        generators: the random generators that the call draws from, which the second run finds as the first did.

    Returns:
        What ``run`` returns. What it raises is raised.
    """
    parts = [getattr(part, "_orig_mod", part) for part in components_of(pipe).values()]
    lock = next((_ONE_AT_A_TIME[part] for part in parts if isinstance(part, Module) and part in _ONE_AT_A_TIME), None)
    if lock is None:
        return run()
    with lock:
        attachment = attachment_of(pipe)
        if attachment is None:
            return run()
        drawn = [(generator, generator.get_state()) for generator in generators]
        try:
            result = run()
            _log(attachment, logger)
            return result
        except Exception as error:
            if not _is_ours(error):
                raise
            logger.warning("dit-accel: a request runs without methods: %s", _line(error))
        finally:
            attachment.reset()
        for generator, state in drawn:
            generator.set_state(state)
        with attachment.suspended():
            return run()


def generators_of(generators: Any) -> list[Any]:
    """List a request's generators, which are one, several or None."""
    several = generators if isinstance(generators, list | tuple) else [generators]
    return [generator for generator in several if hasattr(generator, "get_state")]


def _log(attachment: Attachment, logger: logging.Logger) -> None:
    """Log in one line what the methods did in a request."""
    try:
        report = attachment.report()
        notes = [note for note in report.notes if not note.startswith("preset ")]
        what = "; ".join([*report.first_lines()[:1], *notes]) or "nothing ran"
        logger.info("dit-accel: %s: density %.3f; %s", ", ".join(report.methods), report.density, _line(what))
    except Exception as error:  # the answer is there already
        logger.warning("dit-accel: no report of this request: %s", _line(error))


def _line(text: Any) -> str:
    return " ".join(str(text).split()) or type(text).__name__


def _is_ours(error: BaseException) -> bool:
    """Tell whether an error came out of our code: raised by it, or by the libraries that it called."""
    if isinstance(error, DitAccelError):
        return True
    modules = list[str]()
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        modules.append(str(traceback.tb_frame.f_globals.get("__name__", "")))
        traceback = traceback.tb_next
    called = next((name for name in reversed(modules) if name.split(".")[0] not in _BENEATH), "")
    return called.startswith(("dit_accel.", "dit_accel_kernels")) and not called.startswith("dit_accel.serving")
