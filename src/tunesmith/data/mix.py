"""Several datasets → one, their rows interleaved by weights after a plan drawn from a seed."""

import math
import numbers
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import numpy as np

from tunesmith.errors import ConfigError, DataError
from tunesmith.lookup import did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Mixable = TypeVar("Mixable", Dataset, IterableDataset)

Stop = Literal["first", "all"]
Item = TypeVar("Item")
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
    parts: Sequence[Callable[[], Iterator[Item]]],
    shares: np.ndarray | None,
    *seed: int,
    stop: Stop = "first",
    names: Sequence[str] = (),
    skip_empty: bool = False,
) -> Iterator[Item]:
    """Items of several streams as `plan_mixture` would lay them out, read one ahead.

    Args:
        parts: each begins its stream, anew whenever it is called; with `stop="all"` streams that ended begin again.
        shares: how often each is drawn, adding up to 1. `None`: one after another.
        seed: numbers that the draws depend on, such as a seed and an epoch.
        stop: as in `plan_mixture`.
        names: what an error calls the parts.
        skip_empty: a part without any item is passed over, where with `stop="first"` it would end the mixture.

    Raises: DataError for a part that has to begin again and gives nothing.
    """
    if shares is None:
        for begin in parts:
            yield from begin()
        return
    rest = {index: parts[index]() for index in np.flatnonzero(shares).tolist()}
    firsts = {index: next(items, None) for index, items in rest.items()}
    ahead = {index: item for index, item in firsts.items() if item is not None}
    ended: set[int] = set()
    for index in chain.from_iterable(array.tolist() for array in draws(shares, *seed)):
        if not ahead or (stop == "first" and len(ahead) < len(rest) and not skip_empty):
            return
        if index not in ahead:
            continue
        yield ahead[index]
        ahead[index] = next(rest[index], None)
        if ahead[index] is None:
            ended.add(index)
            if stop == "first" or len(ended) == len(ahead):
                return
            rest[index] = parts[index]()
            ahead[index] = next(rest[index], None)
            if ahead[index] is None:
                name = names[index] if names else f"stream {index + 1} of {len(parts)}"
                raise DataError(
                    f"{name} gave rows once and none when it was read again, as a generator does. Give a stream that "
                    "can be read several times, or end with the first (mixture_stop)."
                )


def shuffled_stream(items: Iterator[Item], size: int, generator: random.Random) -> Iterator[Item]:
    """Items in an order drawn from the next `size` of them; each comes once."""
    held: Sequence[Item] = list(islice(items, size))
    for item in items:
        index = generator.randrange(len(held))
        yield held[index]
        held[index] = item
    generator.shuffle(held)
    yield from held


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
