"""Several processes under torchrun: what the first decides for all, before there is a trainer."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from tunesmith.errors import TunesmithError

Found = TypeVar("Found")


def num_processes() -> int:
    """How many processes run this program together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process prints and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


def first_decides(function: Callable[[], Found], use_cpu: bool = False) -> Found:
    """What `function` returns on the first process, on every process; an error of ours is raised on all of them.

    Each process by itself would come too late: the folder that the first one has made is not empty for the second.
    """
    if num_processes() == 1:
        return function()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=use_cpu)  # joins the process group
    found: list[Any] = [None]
    if is_first_process():
        try:
            found = [function()]
        except TunesmithError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], TunesmithError):
        raise found[0]
    return found[0]
