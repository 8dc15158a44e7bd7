"""Several processes answer together: who has which share, and everybody's results on each of them."""

from typing import Any, TypeVar

from torch import distributed

Item = TypeVar("Item")


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) where nobody started several."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gathered(items: list[Item]) -> list[Item]:
    """The items of all processes, on each of them, in the order of the processes; every process must call it."""
    _, world = rank_and_world()
    if world == 1:
        return items
    parts: list[Any] = [None] * world
    distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
