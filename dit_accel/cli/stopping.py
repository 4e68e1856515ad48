"""How Ctrl-C and SIGTERM end a command: soon, wherever it is, and after it has cleaned up.

The signal raises an exception in the main thread, which ends the command as any error does. That alone is not enough:
Python drops what is raised in ``__del__`` or in the callback of a weak reference, raises nothing while the main thread
is inside a long call of compiled code, and torch aborts where its modules are interrupted as they load. So a thread
that hears of the signal at once sends it again until the command has ended, and after `PATIENCE` seconds ends the
process itself.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from ..files import remove_temporaries

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
"""The signals that stop a command, and what they are called."""

PATIENCE = 4.0
"""Seconds that a command has to clean up before its process is ended."""

AGAIN = 1.0
"""Seconds after which a signal is sent again, if the command goes on, and that a module may go on loading."""

WHOLE = "nothing half-written is left"
"""What is said of the files of a stopped command that says nothing else."""

SOON = 0.05
"""The same, where the exception was dropped or could not be raised."""

_SOON = b"\0"
"""What tells the thread so; no signal has this number."""


class Terminated(BaseException):
    """A SIGTERM arrived: everything cleans up as after Ctrl-C."""


class Guard:
    """Watches for the signals that stop a command.

    Args:
        patience: seconds from a signal to the end of the process; None: `PATIENCE`.

    Attributes:
        number: the first signal that arrived, None: none has.
        kept: what is said of the command's files if it is stopped.
    """

    def __init__(self, patience: float | None = None) -> None:
        self.number: int | None = None
        self.kept = WHOLE
        self._patience = PATIENCE if patience is None else patience
        self._raises, self._ended, self._said, self._loading = True, False, False, False
        self._before: dict[int, Any] = {}

    @property
    def code(self) -> int | None:
        """The exit code of a stopped command, None if it was not stopped."""
        return None if self.number is None else 128 + self.number

    @property
    def line(self) -> str:
        """What a stopped command says last."""
        return f"stopped by {NAMES[signal.Signals(self.number or signal.SIGINT)]}; {self.kept}"

    def start(self) -> None:
        """Begin to watch; a signal that the process was started to ignore, as with nohup, stays ignored."""
        self._hears, self._tells = socket.socketpair()
        self._tells.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._tells.fileno(), warn_on_full_buffer=False)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        for number in NAMES:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: compiled code has set its own
                self._before[number] = signal.signal(number, self._raise)
        self._thread = threading.Thread(target=self._watch, args=(threading.get_ident(),), daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Raise nothing any more: the command has ended."""
        self._raises = False

    def end(self) -> None:
        """Stop watching, and leave everything as it was before `start`."""
        self.settle()
        self._ended = True
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        sys.unraisablehook = self._hook
        self._tells.close()
        self._thread.join()
        self._hears.close()

    def said(self) -> bool:
        """Return whether the last line has been said, and take it as said from now on."""
        before, self._said = self._said, True
        return before

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        self._loading = self._raises and _is_importing(frame)
        if self._loading:
            self._send_again()
        elif self._raises:
            raise KeyboardInterrupt if self.number == signal.SIGINT else Terminated

    def _send_again(self) -> None:
        with contextlib.suppress(OSError):
            self._tells.send(_SOON)

    def _unraisable(self, dropped: Any) -> None:
        if self._raises and self.number and issubclass(dropped.exc_type, (KeyboardInterrupt, Terminated)):
            self._send_again()
        else:
            self._hook(dropped)

    def _watch(self, main: int) -> None:
        """Send a signal again while the command goes on, and end the process after its time."""
        began = None
        while True:
            self._hears.settimeout(None if began is None else min(AGAIN, self._patience))
            try:
                heard = self._hears.recv(64)
            except TimeoutError:
                heard = None
            if heard == b"":
                return
            self.number = self.number or next((number for number in heard or b"" if number in self._before), None)
            if self.number is None or self._ended:
                continue
            began = began or time.monotonic()
            patience = min(AGAIN, self._patience) if self._loading else self._patience
            if time.monotonic() >= began + patience:
                self._leave()
            if self._raises and (heard is None or _SOON in heard):
                time.sleep(SOON)
                signal.pthread_kill(main, self.number)

    def _leave(self) -> None:
        """End the process from the thread: its children, then its half-written files, then itself."""
        for child in multiprocessing.active_children():
            child.kill()
        remove_temporaries()
        if not self.said():
            cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
            with contextlib.suppress(OSError):
                os.write(2, f"{cursor}error: {self.line}\n".encode())
        os._exit(self.code or 0)


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether a module is being loaded: what compiled ones run meanwhile may not survive an exception."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


_guard: Guard | None = None
"""The one that watches now."""


@contextlib.contextmanager
def stoppable() -> Iterator[Guard]:
    """Let Ctrl-C raise `KeyboardInterrupt` and SIGTERM `Terminated` inside the block, surely and soon.

    Inside such a block, and outside the main thread, where no signal can be handled, nothing is changed.
    """
    global _guard
    if _guard is not None or threading.current_thread() is not threading.main_thread():
        yield _guard or Guard()
        return
    _guard = made = Guard()
    made.start()
    try:
        yield made
    finally:
        _guard = None
        made.end()


def keeps(text: str) -> None:
    """Set what the running command says of its files if it is stopped, such as what stays and how to go on."""
    if _guard is not None:
        _guard.kept = text


def end_on_signals() -> None:
    """End this process, which computes for another, at once and without a word when a SIGTERM arrives.

    Ctrl-C is for the process that started it.
    """
    global _guard
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _guard = made = Guard(patience=0.0)
    made.settle()
    made.said()
    made.start()


_mask: list[set[Any]] = []
"""The signals that were held back before a fork."""


def _hold_back() -> None:
    if _guard is not None:
        _mask.append(signal.pthread_sigmask(signal.SIG_BLOCK, NAMES))


def _let_through() -> None:
    if _mask:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask.pop())


def _forget() -> None:
    """Take a forked process, which shares the socket, out of what its parent watches."""
    global _guard
    if _guard is not None:
        _guard = None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _let_through()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_back, after_in_parent=_let_through, after_in_child=_forget)
