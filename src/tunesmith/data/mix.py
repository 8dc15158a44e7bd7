"""Several datasets → one, their rows interleaved by weights after a plan drawn from a seed."""

import math
import numbers
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np

from tunesmith.errors import ConfigError, DataError
from tunesmith.lookup import did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Mixable = TypeVar("Mixable", Dataset, IterableDataset)

Stop = Literal["first", "all"]
Item = TypeVar("Item")
Cursor = dict[str, Any]
"""Where a stream stands, as the function that reads it keeps it; `data.cursor` makes it JSON."""
DRAWS = 4096  # drawn at once


def plan_mixture(
    sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 42, stop: Stop = "first"
) -> np.ndarray:
    """Which row of which dataset comes when: (N, 2) of dataset and row, every dataset in its own order.

    Args:
        sizes: rows of each dataset, at least one.
        weights: how often each is drawn; they need not add up to 1, and 0 leaves a dataset out. `None`: the datasets
            come one after another, whole.
        seed: of the draws.
        stop: "first" ends with the last row of whichever dataset ends first, so that no row comes twice; "all" with
            that of whichever ends last, so that every row comes, and those of the others several times.

    Raises: ConfigError for weights that cannot be drawn from, or another `stop`.

    >>> plan_mixture([2, 1]).tolist()
    [[0, 0], [0, 1], [1, 0]]
    """
    check_stop(stop)
    sizes = np.asarray(sizes, dtype=np.int64)
    if weights is None:
        parts = np.repeat(np.arange(len(sizes)), sizes)
        return np.stack([parts, np.concatenate([np.arange(size) for size in sizes])], axis=1)
    shares = shares_of(weights, range(len(sizes)))
    drawn, counts, ended = [], np.zeros(len(sizes), dtype=np.int64), None
    source = draws(shares, seed)
    while ended is None:
        drawn.append(next(source))
        counts += np.bincount(drawn[-1], minlength=len(sizes))
        reached = (counts >= sizes)[shares > 0]
        ended = reached if (reached.any() if stop == "first" else reached.all()) else None
    parts = np.concatenate(drawn)
    rows, lasts = np.zeros_like(parts), []
    for part in np.flatnonzero(shares):
        places = np.flatnonzero(parts == part)
        rows[places] = np.arange(len(places)) % sizes[part]
        lasts += [places[sizes[part] - 1]] if len(places) >= sizes[part] else []
    end = 1 + (min(lasts) if stop == "first" else max(lasts))
    return np.stack([parts[:end], rows[:end]], axis=1)


def check_stop(stop: str) -> None:
    """Raise ConfigError for what is no `Stop`."""
    if stop not in get_args(Stop):
        raise ConfigError(f"a mixture's stop (mixture_stop) is 'first' or 'all', not {stop!r}.")


def draws(shares: np.ndarray, *seed: int) -> Iterator[np.ndarray]:
    """Indices drawn by their shares, for ever, in arrays."""
    generator = np.random.default_rng(seed)
    while True:
        yield generator.choice(len(shares), size=DRAWS, p=shares)


def mix_streams(
    parts: Sequence[Callable[[Cursor], Iterator[Item]]],
    shares: np.ndarray | None,
    *seed: int,
    stop: Stop = "first",
    names: Sequence[str] = (),
    skip_empty: bool = False,
    cursor: Cursor | None = None,
) -> Iterator[Item]:
    """Items of several streams as `plan_mixture` would lay them out, read one ahead.

    Args:
        parts: each begins its stream, anew whenever it is called with an empty cursor, else where that says; with
            `stop="all"` streams that ended begin again.
        shares: how often each is drawn, adding up to 1. `None`: one after another.
        seed: numbers that the draws depend on, such as a seed and an epoch.
        stop: as in `plan_mixture`.
        names: what an error calls the parts.
        skip_empty: a part without any item is passed over, where with `stop="first"` it would end the mixture.
        cursor: kept up to date, so that a copy of it takes the mixture up where it stood.

    Raises: DataError for a part that has to begin again and gives nothing.
    """
    cursor = {} if cursor is None else cursor
    inside = cursor.setdefault("parts", [{} for _ in parts])
    if shares is None:
        for index in range(cursor.setdefault("part", 0), len(parts)):
            cursor["part"] = index
            yield from parts[index](inside[index])
        return
    rest = {index: parts[index](inside[index]) for index in np.flatnonzero(shares).tolist()}
    if "ahead" not in cursor:
        firsts = {index: next(items, None) for index, items in rest.items()}
        cursor["ahead"] = [[index, item] for index, item in firsts.items() if item is not None]
        cursor["ended"], cursor["drawn"] = [], 0
        cursor["is_last"] = False
    ahead, ended = dict(cursor["ahead"]), cursor["ended"]
    drawn = chain.from_iterable(array.tolist() for array in draws(shares, *seed))
    for index in islice(drawn, cursor["drawn"], None):
        if cursor["is_last"]:
            return
        cursor["drawn"] += 1
        if not ahead or (stop == "first" and len(ahead) < len(rest) and not skip_empty):
            return
        if index not in ahead:
            continue
        item, ahead[index] = ahead[index], next(rest[index], None)
        if ahead[index] is None:
            ended += [] if index in ended else [index]
            cursor["is_last"] = stop == "first" or len(ended) == len(ahead)
            if not cursor["is_last"]:
                inside[index].clear()
                rest[index] = parts[index](inside[index])
                ahead[index] = next(rest[index], None)
                if ahead[index] is None:
                    raise DataError(gives_once(names[index] if names else f"stream {index + 1} of {len(parts)}"))
        cursor["ahead"] = [list(pair) for pair in ahead.items()]
        yield item


def gives_once(name: str) -> str:
    """The sentence for a stream that has to begin again and gives nothing."""
    return (
        f"{name} gave rows once and none when it was read again, as a generator does. Give a stream that can be read "
        "several times, or end with the first (mixture_stop)."
    )


def shuffled_stream(
    items: Iterator[Item], size: int, generator: random.Random, cursor: Cursor | None = None
) -> Iterator[Item]:
    """Items in an order drawn from the next `size` of them; each comes once. `cursor` as in `mix_streams`."""
    cursor = {} if cursor is None else cursor
    if "held" in cursor:
        generator.setstate(state_of(cursor["random"]))
    else:
        cursor.update(held=list(islice(items, size)), given=None)
    cursor["random"] = generator
    held = cursor["held"]
    if cursor["given"] is None:
        for item in items:
            index = generator.randrange(len(held))
            found, held[index] = held[index], item
            yield found
        generator.shuffle(held)
        cursor["given"] = 0
    while cursor["given"] < len(held):
        cursor["given"] += 1
        yield held[cursor["given"] - 1]


def state_of(saved: Any) -> Any:
    """The state of a `random.Random`, from one or from what became of it in JSON."""
    if isinstance(saved, random.Random):
        return saved.getstate()
    version, numbers, rest = saved
    return version, tuple(numbers), rest


def shares_of(weights: Mapping | Sequence[float], names: Sequence) -> np.ndarray:
    """Weights in the order of `names`, adding up to 1.

    Raises: ConfigError for a weight too many or too few, or one that is no number from 0 on.
    """
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in names:
                hint = did_you_mean(str(name), map(str, names))
                raise ConfigError(f"weights: there is no dataset '{name}'.{hint} There are {_named(names)}.")
        if missing := [name for name in names if name not in weights]:
            raise ConfigError(f"weights: none is given for {_named(missing)}. Give 0 to leave a dataset out.")
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise ConfigError(f"weights: {len(weights)} for {len(names)} datasets. Give one for each.")
    for weight, name in zip(weights, names):
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not 0 <= weight < math.inf:
            raise ConfigError(f"weights: {weight!r} for dataset {name}; expected a number from 0 on.")
    if not sum(weights):
        raise ConfigError("weights: all are 0, so nothing would be drawn. Give one dataset a weight above 0.")
    return np.asarray(weights, dtype=np.float64) / sum(weights)


def mix_datasets(
    parts: "Mapping[str, Mixable] | Sequence[Mixable]",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    *,
    seed: int = 42,
    stop: Stop = "first",
) -> "Mixable":
    """One dataset of the rows of several that have the same columns.

    For datasets in different formats, give the trainer a dict of them as `train_dataset` and the weights as
    `dataset_kwargs={"mixture_weights": {...}}`: each is then rendered and tokenized by itself.

    Args:
        parts: all `datasets.Dataset` or all `datasets.IterableDataset`, by name or in a list.
        weights, seed, stop: as in `plan_mixture`; by name if `parts` are. Streams are interleaved by
            `datasets.interleave_datasets`, which draws other numbers from the same seed.

    Returns: a dataset with the columns of the parts; no column says where a row came from.
    Raises: ConfigError for no parts, other columns, or weights that do not fit.
    """
    import datasets

    names = list(parts) if isinstance(parts, Mapping) else list(range(len(parts)))
    found = list(parts.values()) if isinstance(parts, Mapping) else list(parts)
    streamed = all(isinstance(part, datasets.IterableDataset) for part in found)
    if not found or not (streamed or all(isinstance(part, datasets.Dataset) for part in found)):
        what = ", ".join(sorted({type(part).__name__ for part in found})) or "nothing"
        raise ConfigError(f"mix_datasets: expected datasets.Dataset, or datasets.IterableDataset for all; got {what}.")
    _check_columns(found, names)
    check_stop(stop)
    shares = None if weights is None else shares_of(weights, names)
    if shares is None:
        return datasets.concatenate_datasets(found)
    if streamed:
        return _interleaved(found, shares, seed, stop)
    sizes = [len(part) for part in found]
    for name, size in zip(names, sizes):
        if not size:
            raise ConfigError(f"mix_datasets: dataset {name} has no rows. Leave it out.")
    plan = plan_mixture(sizes, shares, seed, stop)
    return datasets.concatenate_datasets(found).select(places(plan, sizes))


def places(plan: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Where the rows of a plan stand when the datasets, of these sizes, are laid end to end."""
    return (np.cumsum(sizes) - sizes)[plan[:, 0]] + plan[:, 1]


def _interleaved(parts: "list[IterableDataset]", shares: np.ndarray, seed: int, stop: Stop) -> "IterableDataset":
    import datasets

    drawn = [index for index, share in enumerate(shares) if share > 0]
    return datasets.interleave_datasets(
        [parts[index] for index in drawn],
        probabilities=[float(shares[index]) for index in drawn],
        seed=seed,
        stopping_strategy="first_exhausted" if stop == "first" else "all_exhausted",
    )


def _check_columns(parts: "Sequence[Mixable]", names: Sequence) -> None:
    for part, name in zip(parts, names):
        theirs, ours = part.column_names, parts[0].column_names
        if theirs is not None and ours is not None and set(theirs) != set(ours):
            raise ConfigError(
                f"mix_datasets: dataset {names[0]} has the columns {_named(ours)}, but {name} has {_named(theirs)}. "
                "Rename or remove columns, or give the trainer a dict of datasets as train_dataset."
            )


def _named(names: Sequence) -> str:
    return ", ".join(map(str, names)) or "none"
