"""Which weights an adapter was trained on, told beside it: where they lay, and a sample of their bytes."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

MERGED = "merged_adapters"  # attribute of a model
SAMPLE = 64  # bytes of each tensor: layers that a run froze are equal in two models, so every tensor has a say


def described(model: nn.Module, folder: str | Path) -> dict[str, Any]:
    """What `finetuning_args.json` in `folder` tells of the base: name, place as seen from there, and sample."""
    name = base_name(model)
    place = os.path.relpath(Path(name).resolve(), Path(folder).resolve()) if name and Path(name).is_dir() else None
    return {"name": name, "folder": place, "sample": sample(model)}


def found_again(name: str, told: dict[str, Any], folder: Path) -> str:
    """Where a base called `name` lies, by what is told beside its adapter.

    A relative name meant the folder that a run began in. Read from another one it can be another model, or none.
    A name that was corrected by hand since counts as it stands.
    """
    beside = (folder / told["folder"]).resolve() if told.get("folder") and told.get("name") == name else None
    if beside is None or not beside.is_dir() or beside == Path(name).resolve():
        return name
    return name if Path(name).is_absolute() and Path(name).exists() else str(beside)


def warn_of_another(model: nn.Module, told: dict[str, Any], adapter: str | Path) -> None:
    """Say where the base under an adapter is not the one that it was trained on."""
    if told.get("sample") and sample(model) not in (None, told["sample"]):
        merged = ", or the adapters that were merged into them," if getattr(model, MERGED, ()) else ""
        warnings.warn(
            f"the weights in {base_name(model)}{merged} are not those that {adapter} was trained on: it may answer "
            "worse. Put them back, or train it again on these.",
            stacklevel=3,
        )


def base_name(model: nn.Module) -> str:
    """Folder or Hub id that a model's weights came from; empty for one that was made in memory."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or ""


def note_merged(model: nn.Module, weights: Path) -> None:
    """Remember that an adapter, by the file of its weights, was merged into a base: it is a part of it from now on."""
    setattr(model, MERGED, (*getattr(model, MERGED, ()), weights))


def sample(model: nn.Module) -> str | None:
    """A hash over some bytes of each tensor in the base's files, and in those of adapters that were merged into it.

    `None` where there are no such files to be read.
    """
    digest, name = hashlib.sha256(), base_name(model)
    try:
        files = weight_files(name, getattr(model.config, "_commit_hash", None)) if name else []
        if not files:
            return None
        for part in (files, *([file] for file in getattr(model, MERGED, ()))):
            for tensor, data in sorted(samples(part)):
                digest.update(tensor.encode() + data)
    except (OSError, ValueError, KeyError):
        return None
    return digest.hexdigest()[:16]


def samples(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Each tensor's name, and bytes from its middle: padding rows and zeros are at the ends."""
    for path in files:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            for tensor, entry in header.items():
                if tensor != "__metadata__":
                    begin, end = entry["data_offsets"]
                    file.seek(8 + size + (begin + end) // 2)
                    yield tensor, file.read(min(SAMPLE, (end - begin + 1) // 2))


def weight_files(name: str, revision: str | None) -> list[Path]:
    """The safetensors files of a folder or of a Hub id in the cache, as transformers chooses among them."""
    found = {}
    for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        found[file] = cached_file(
            name, file, revision=revision, local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
    if found[SAFE_WEIGHTS_NAME]:
        return [Path(found[SAFE_WEIGHTS_NAME])]
    if not found[SAFE_WEIGHTS_INDEX_NAME]:
        return []
    index = Path(found[SAFE_WEIGHTS_INDEX_NAME])
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [index.parent / shard for shard in sorted(shards)]
