"""How Ctrl-C and SIGTERM end a command: by an exception in the main thread, or after `PATIENCE` by a timer.

The timer is for what Python drops: an exception raised in ``__del__``, or one that a library swallows.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from ..files import remove_temporaries

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
"""The signals that stop a command, and what they are called."""

PATIENCE = 4.0
"""Seconds that a command has to clean up before its process is ended."""


class Terminated(BaseException):
    """A SIGTERM arrived: everything cleans up as after Ctrl-C."""


class Guard:
    """What is known of the signals that stop a command."""

    def __init__(self) -> None:
        self.number: int | None = None  # the first signal that arrived
        self.files = "nothing half-written is left"  # what is said of the command's files if it is stopped
        self.raises = True  # whether a signal raises; False when the command has ended
        self.silent = False  # whether the last line has been said
        self.timer = threading.Timer(PATIENCE, self.leave)
        self.timer.daemon = True

    @property
    def line(self) -> str:
        """What a stopped command says last."""
        return f"stopped by {NAMES[signal.Signals(self.number or signal.SIGINT)]}; {self.files}"

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Raise in the main thread; the handler of both signals."""
        if self.number is None:
            self.number = number
            with contextlib.suppress(RuntimeError):  # Python is ending, and starts no threads
                self.timer.start()
        if self.raises and _is_importing(frame):
            self.leave()
        if self.raises:
            raise KeyboardInterrupt if self.number == signal.SIGINT else Terminated

    def leave(self) -> NoReturn:
        """End the process at once: its children, then its half-written files, then itself."""
        for child in multiprocessing.active_children():
            child.kill()
        remove_temporaries()
        if not self.silent:
            cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
            with contextlib.suppress(OSError):
                os.write(2, f"{cursor}error: {self.line}\n".encode())
        os._exit(128 + (self.number or 0))


def _is_importing(frame: FrameType | None) -> bool:
    """Tell whether a module is being loaded; torch's abort the process if an exception meets them."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


_guard: Guard | None = None
"""That of the running command."""


@contextlib.contextmanager
def stoppable(*, until_exit: bool = False) -> Iterator[Guard]:
    """Let Ctrl-C raise `KeyboardInterrupt` and SIGTERM `Terminated` inside the block.

    With ``until_exit`` the handlers stay, so that a signal can end a process whose exit takes too long.

    Inside such a block, and outside the main thread, where no signal can be handled, nothing is changed. A signal that
    the process was started to ignore, as with nohup, stays ignored.
    """
    global _guard
    if _guard is not None or threading.current_thread() is not threading.main_thread():
        yield _guard or Guard()
        return
    _guard = guard = Guard()
    handlers = {number: signal.getsignal(number) for number in NAMES}
    handled = [number for number in NAMES if handlers[number] not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, guard.stop)
    try:
        yield guard
    finally:
        _guard = None
        if not until_exit:
            guard.timer.cancel()
            for number in handled:
                signal.signal(number, handlers[number])


def keeps(text: str) -> None:
    """Set what the running command says of its files if it is stopped, such as what stays and how to go on."""
    if _guard is not None:
        _guard.files = text


def end_on_signals() -> None:
    """End this process without a word when a SIGTERM arrives; leave Ctrl-C to the process for which it computes."""
    guard = Guard()
    guard.number, guard.silent = signal.SIGTERM, True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: guard.leave())
