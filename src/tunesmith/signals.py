"""SIGINT, SIGTERM and SIGUSR1: heeded at once where nothing is lost, after the step where training can be saved.

    with heeded():                a run from its first row to its last file
        with postponed():             training: a signal is noted, and the trainer looks after each step
            with at_once():               evaluation within training: heeded where it stands

A signal that is heeded raises KeyboardInterrupt for Ctrl-C, and `Terminated` (exit code 143) for the others. A second
signal ends the process without a word more; in a program of a person's own, such as a notebook, a second Ctrl-C raises
KeyboardInterrupt where it arrives. Handlers of a person's own stay in place.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Terminated(SystemExit):
    """The process was asked to end, as schedulers do; uncaught, it exits with 143 and prints nothing."""

    def __init__(self, number: int = signal.SIGTERM):
        self.number = number
        super().__init__(143)

    def __str__(self) -> str:
        return signal.Signals(self.number).name


class _Heard:
    """What this process has been told, and whether it acts at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.postpones = False
        self.is_own_process = False


_heard = _Heard()


@contextlib.contextmanager
def heeded(is_own_process: bool = False) -> Iterator[None]:
    """Handle the signals inside, in the main thread, where nobody else does already.

    Args:
        is_own_process: nothing but a run of ours is in this process, so a second Ctrl-C may end it.
    """
    ours = {}
    if threading.current_thread() is threading.main_thread():
        defaults = (signal.SIG_DFL, signal.default_int_handler)
        ours = {number: before for number in SIGNALS if (before := signal.getsignal(number)) in defaults}
    if ours:
        _heard.number, _heard.is_own_process = None, is_own_process
    for number in ours:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, before in ours.items():
            signal.signal(number, before)


@contextlib.contextmanager
def postponed(postpones: bool = True) -> Iterator[None]:
    """Inside, the first signal is only noted (`received`)."""
    before, _heard.postpones = _heard.postpones, postpones
    try:
        yield
    finally:
        _heard.postpones = before


def at_once() -> contextlib.AbstractContextManager[None]:
    """Inside, a signal is heeded where it arrives; one that was noted before too."""
    if _heard.number is not None:
        heed(_heard.number)
    return postponed(False)


def received() -> int | None:
    """The signal that was noted, if any."""
    return _heard.number


def heed(number: int) -> None:
    """Raise what stands for a signal."""
    _heard.number = None
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(number)


def _handle(number: int, frame: object) -> None:
    for one in SIGNALS:  # the system's own way, so that the second is heard in the middle of anything
        if signal.getsignal(one) is _handle:
            raises = one == signal.SIGINT and not _heard.is_own_process
            signal.signal(one, signal.default_int_handler if raises else signal.SIG_DFL)
    if not _heard.postpones:
        heed(number)
    _heard.number = number
    name = signal.Signals(number).name
    with contextlib.suppress(OSError):
        os.write(2, f"\n{name}: stopping after this step, with a checkpoint. A second one stops at once.\n".encode())
