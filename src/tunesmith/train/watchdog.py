"""A run that does nothing for too long is ended, and says where it stood: hours of silence tell nobody anything."""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_CODE = 1
GRACE = 60.0  # seconds after which the interpreter's own watchdog ends a process whose threads cannot run


class Watchdog:
    """Ends the process when `beat` has not been called for `timeout` seconds, with the stack of every thread on file.

    A thread of Python's waits; where none can run, because some library holds the interpreter, faulthandler's does.

    Args:
        path: file for the stacks.
        tell: is told a sentence before the end, e.g. to write it into the run's status.
    """

    def __init__(self, timeout: float, path: Path, tell: Callable[[str], None]):
        self.timeout, self.path, self.tell = timeout, path, tell
        self.beaten = time.monotonic()
        self._done = threading.Event()

    def beat(self) -> None:
        """Something has happened."""
        self.beaten = time.monotonic()
        faulthandler.dump_traceback_later(self.timeout + GRACE, exit=True, file=self._file)

    @contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Watch inside."""
        with open(self.path, "w", encoding="utf-8") as self._file:
            self.beat()
            thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            thread.start()
            try:
                yield self
            finally:
                self._done.set()
                faulthandler.cancel_dump_traceback_later()
                thread.join()
                if not self.path.stat().st_size:
                    self.path.unlink()

    def _watch(self) -> None:
        while not self._done.wait(max(0.01, min(self.beaten + self.timeout - time.monotonic(), 10.0))):
            silent = time.monotonic() - self.beaten
            if silent >= self.timeout:
                faulthandler.dump_traceback(self._file, all_threads=True)
                self._file.flush()
                self.tell(
                    f"no step ended for {silent:.0f} s (hang_timeout: {self.timeout:g}). Where every thread stood is "
                    f"in {self.path}. If steps are that long, raise hang_timeout."
                )
                os._exit(EXIT_CODE)
