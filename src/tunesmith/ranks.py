"""Several processes run one program, as torchrun starts them: who is who, what the first decides, what all found.

Nothing here imports torch before there is more than one process, or a process group to ask.
"""

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from tunesmith.errors import TunesmithError

Found = TypeVar("Found")
Item = TypeVar("Item")


def num_processes() -> int:
    """How many processes run this program together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process prints and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


def join_processes(use_cpu: bool = False) -> None:
    """Meet the other processes, before there is a trainer that would; nothing happens in a process alone."""
    if num_processes() > 1:
        from accelerate import PartialState

        PartialState(cpu=use_cpu)


def first_decides(function: Callable[[], Found], use_cpu: bool = False) -> Found:
    """What `function` returns on the first process, on every process; an error of ours is raised on all of them.

    Each process by itself would come too late: the folder that the first one has made is not empty for the second.
    """
    if num_processes() == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    join_processes(use_cpu)
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


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) where no processes have met."""
    distributed = sys.modules.get("torch.distributed")  # not imported: nobody has met there
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gathered(items: list[Item]) -> list[Item]:
    """The items of all processes, on each of them, in the order of the processes; every process must call it."""
    _, world = rank_and_world()
    if world == 1:
        return items
    from torch import distributed

    parts: list[Any] = [None] * world
    distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
