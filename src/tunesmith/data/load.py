"""A Hub id, a file or a folder becomes rows, one by one; each row knows the file and the line it came from."""

import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tunesmith.data.readers import READERS, read_jsonl
from tunesmith.data.report import Report, visible
from tunesmith.data.rows import Row, RowError, without_nulls
from tunesmith.errors import ConfigError, DataError
from tunesmith.lookup import did_you_mean

T = TypeVar("T")
EXTENSIONS = "File extension must be txt, csv, json or jsonl, or parquet or arrow."
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def good_rows(items: Iterable[Row | RowError], on_bad_row: str, report: Report) -> Iterator[Row]:
    """The rows, counted as they pass; what could not be read raises, or is counted as dropped."""
    for item in items:
        if isinstance(item, RowError) and on_bad_row == "error":
            raise item
        report.read += 1
        if isinstance(item, RowError):
            report.dropped(item.reason, item, str(item))
        else:
            yield item


def data_files(path: str, report: Report, name: str = "") -> list[str]:
    """The file itself, or the data files of a folder in name order; hidden files and subfolders are not looked at.

    Raises: DataError for a path that is absent, and a folder of splits, of no data files or of several types.
    """
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise DataError(_absent(name or path, path))
        return [path]
    _check_no_splits(path)
    found = sorted((e for e in os.scandir(path) if not e.name.startswith(".")), key=lambda e: e.name)
    entries, folders = [e.name for e in found if e.is_file()], [f"{e.name}/" for e in found if e.is_dir()]
    has_arrow = any(name.endswith(".arrow") for name in entries)  # as `save_to_disk` writes, with two files beside
    beside = ("dataset_info.json", "state.json") if has_arrow else ("dataset_info.json",)
    files = [name for name in entries if Path(name).suffix.lower() in READERS and name not in beside]
    if not files:
        inside = f" Its folders are not looked into; name one: {', '.join(map(visible, folders[:5]))}." * bool(folders)
        raise DataError(
            f"{path} holds no data file. It must hold files ending in {', '.join(READERS)}. {EXTENSIONS}{inside}"
        )
    gone = [f"{e.name} (a link to nothing)" for e in found if not os.path.exists(e.path)]
    ignored = [*(name for name in entries if name not in files), *folders, *gone]
    if ignored:
        report.note(f"{path}: not read: {', '.join(map(visible, ignored[:5]))}{' ...' * (len(ignored) > 5)}")
    for name in files:
        if file_type(name) != file_type(files[0]):
            raise DataError(
                f"{path}: file type does not match: it mixes types: {files[0]} and {name}. Move one of them away, or "
                "name the files one by one."
            )
    return [os.path.join(path, name) for name in files]


def _check_no_splits(path: str) -> None:
    """Refuse a folder of several splits, as `DatasetDict.save_to_disk` writes it."""
    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        folders = sorted(os.path.join(path, e.name) for e in os.scandir(path) if e.is_dir())
        raise DataError(f"{path} holds a dataset in splits. Name one of them: {', '.join(map(visible, folders))}.")


def file_type(name: str) -> str:
    """The ending; JSON may be written as an array or in lines under either of its endings."""
    suffix = Path(name).suffix.lower()
    return ".json" if suffix == ".jsonl" else suffix


def read_files(files: Iterable[str]) -> Iterator[Row | RowError]:
    """The rows of files, one after another, each read as far as it is asked for; DataError for one without rows."""
    for path in files:
        suffix = Path(path).suffix.lower()
        if suffix not in READERS:
            raise DataError(
                f"{path}: cannot read a file that ends in '{visible(suffix, 20)}'. {EXTENSIONS} Convert or unpack it."
            )
        try:
            yield from _not_empty(READERS[suffix](path), path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_files_after(files: Sequence[str], path: str, line: int) -> Iterator[Row | RowError]:
    """The rows of files behind a line of one of them. Lines of JSON before it are counted, and not read.

    Raises: DataError where the file is gone.
    """
    if path not in files:
        raise DataError(f"{path} was being read and is gone, so its stream cannot be taken up. Put it back.")
    try:
        if Path(path).suffix.lower() == ".jsonl":
            yield from read_jsonl(path, after=line)
        else:
            yield from (row for row in READERS[Path(path).suffix.lower()](path) if row.line > line)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    yield from read_files(files[files.index(path) + 1 :])


def looks_like_hub_id(name: str) -> bool:
    """`owner/name`, unless it reads as a path: a known ending, or an owner that is a folder here."""
    owner = name.partition("/")[0]
    return bool(HUB_ID.fullmatch(name)) and Path(name).suffix.lower() not in READERS and not os.path.isdir(owner)


def read_hub(
    repository: str, split: str = "train", *, streaming: bool = False, **options: str | None
) -> Iterator[Row]:
    """The rows of a Hub dataset; with `streaming` they are downloaded as they are read.

    Args:
        options: `name` (its subset), `data_dir` and `revision` of `datasets.load_dataset`; `None` is not passed on.

    Raises: DataError for a dataset that cannot be had or has no rows.
    """
    return _not_empty(_hub_rows(repository, split, streaming, options), repository)


def _hub_rows(name: str, split: str, streaming: bool, options: dict[str, str | None]) -> Iterator[Row]:
    given = {key: value for key, value in options.items() if value is not None}
    given |= {"streaming": True} if streaming else {}
    try:
        import datasets

        dataset = datasets.load_dataset(name, split=split, **given)
    except Exception as error:  # the library's errors share no base; every one means the dataset cannot be had
        what = visible(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__, 200)
        raise DataError(
            f"dataset '{name}' is no file or folder here and could not be loaded from the Hub (split '{split}'): "
            f"{what}. Check the name, the split and the network, or name a local file."
        ) from error
    for number, value in enumerate(dataset, 1):
        yield Row(without_nulls(value), name, number)


def _absent(name: str, path: str) -> str:
    parent, last = os.path.split(path)
    if os.path.islink(path):
        return f"{visible(name)} is a link to {visible(os.readlink(path))}, which is not there. Mend the link."
    siblings = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    hint = did_you_mean(last, [s for s in siblings if not s.startswith(".")])
    if not hint and parent and not os.path.isdir(parent):
        hint = f" There is no folder {visible(parent)} either."
    return f"{visible(name)} is neither a file nor a folder, nor a Hub id of the form owner/name.{hint}"


def _not_empty(items: Iterable[T], name: str) -> Iterator[T]:
    count = 0
    for count, item in enumerate(items, 1):  # noqa: B007
        yield item
    if not count:
        raise DataError(f"{name} is empty: it holds no rows. Put at least one example into it.")


# Held-out rows -----------------------------------------------------------------------------------------------------


def split_rows(rows: Sequence[T], val_size: float, seed: int) -> tuple[list[T], list[T]]:
    """Hold out a share (`val_size` < 1, at least one row) or a count (≥ 1): rows to train on, rows held out.

    The draw depends on `seed` and the number of rows alone; both parts keep the order of `rows`.

    Raises: DataError when nothing would be left to train on; ConfigError when a count is not whole.
    """
    if val_size < 0 or (val_size >= 1 and val_size != int(val_size)):
        raise ConfigError(f"val_size: expected a share below 1 or a whole number of rows, got {val_size}.")
    if val_size == 0:
        return list(rows), []
    num_held_out = int(val_size) if val_size >= 1 else max(1, round(val_size * len(rows)))
    if num_held_out >= len(rows):
        raise DataError(
            f"val_size: {val_size:g} holds out {num_held_out} of {len(rows)} rows, so none is left to train on. "
            "Lower it, or name held-out files with eval_dataset."
        )
    held_out = set(random.Random(seed).sample(range(len(rows)), num_held_out))
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [rows[index] for index in sorted(held_out)]
