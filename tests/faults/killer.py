"""Ends this process at a given write of a save: before it, or in the middle of a file."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import peft.peft_model
import safetensors.torch
import torch
import transformers.modeling_utils

WRITING = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


class Killer:
    """Counts what changes a folder; kills at the `at`-th change, or never.

    Python tells of its own file operations (`sys.addaudithook`). torch and safetensors write past it, so their
    functions are wrapped: killed there, they leave half a file.
    """

    def __init__(self, folder: Path, at: int | None = None):
        self.folder, self.at, self.seen, self.armed = str(folder), at, [], False
        sys.addaudithook(self._hear)
        torch.save = self._halving(torch.save, 1)
        save_file = self._halving(safetensors.torch.save_file, 1)
        for module in (transformers.modeling_utils, peft.peft_model):
            module.safe_save_file = save_file

    def _hear(self, event: str, args: tuple) -> None:
        if not self.armed:
            return
        writes = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in WRITING) and str(args[0]).startswith(self.folder):
            self._count(f"{event} {Path(str(args[0])).name}")

    def _halving(self, function: Any, place: int) -> Any:
        def save(*args: Any, **kwargs: Any) -> Any:
            path = str(args[place]) if len(args) > place else str(kwargs.get("filename", ""))
            if self.armed and path.startswith(self.folder):
                self._count(f"half of {Path(path).name}", path)
            return function(*args, **kwargs)

        return save

    def _count(self, what: str, half: str | None = None) -> None:
        self.seen.append(what)
        if len(self.seen) == self.at:
            if half is not None:
                self.armed = False
                Path(half).write_bytes(b"PK half of a file")
            os.kill(os.getpid(), signal.SIGKILL)
