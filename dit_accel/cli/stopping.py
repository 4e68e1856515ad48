"""How Ctrl-C and SIGTERM end a process of ours: by an exception, or by force where Python or a library drops that."""

import contextlib
import os
import signal
import threading
import traceback
from multiprocessing import active_children
from types import FrameType, SimpleNamespace

from ..files import remove_temporaries

STOP = SimpleNamespace(number=0, raises=False, files="nothing half-written is left", patience=4.0)
"""The signal that came first; whether one raises now; what is said of files; seconds until the process is ended."""


def watch() -> None:
    """Let the two signals stop this process, but for one that it was started to ignore."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    if not STOP.number:
        STOP.number, timer = number, threading.Timer(STOP.patience, leave)
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # Python is ending, and starts no threads
            timer.start()
    if STOP.raises:
        if any("<frozen importlib" in caller.f_code.co_filename for caller, _ in traceback.walk_stack(frame)):
            leave()  # torch's modules abort the process if an exception meets them as they load
        raise KeyboardInterrupt


def leave() -> None:
    """End this process at once: its children, then its half-written files, then itself with a line that says why."""
    for child in active_children():
        child.kill()
    remove_temporaries()
    line = f"error: stopped by {'SIGTERM' if STOP.number == signal.SIGTERM else 'Ctrl-C'}; {STOP.files}\n"
    with contextlib.suppress(OSError):
        os.write(2, (b"\x1b[?25h" if os.isatty(2) else b"") + line.encode())  # a progress bar hides the cursor
    os._exit(128 + STOP.number)
