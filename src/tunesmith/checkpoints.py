"""Checkpoints as folders: staged, sealed with a manifest of hashes, renamed into place; deleted by rename first.

    .tmp-checkpoint-40/      being written
    checkpoint-40/           sealed: manifest.json names every file, its size and its hash
    .trash-checkpoint-20/    being deleted

Only names without a dot are ever read, so a kill at any moment leaves whole checkpoints, and leftovers that the next
start removes. What a checkpoint means is `train.saving`'s business; nothing here imports torch.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from tunesmith.errors import CheckpointError

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # transformers' name
MANIFEST = "manifest.json"
FORMAT = 1
STAGED, DELETED = ".tmp-", ".trash-"
NAME = re.compile(r"checkpoint-(\d+)")
CHUNK = 8 << 20
FLUSH_SECONDS = 0.05


class Last(NamedTuple):
    """The newest checkpoint that is as it was written, and why newer ones are not used."""

    path: Path | None
    skipped: list[str]


# Writing -----------------------------------------------------------------------------------------------------------


def staged(run: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is written before anyone may see it: on the same file system as its place."""
    return Path(run) / f"{STAGED}checkpoint-{step}" / f"checkpoint-{step}"


@contextlib.contextmanager
def flushed(folder: Path) -> Iterator[None]:
    """While files are written into a folder inside, a thread brings to disk what there is of them.

    `seal` must wait until all is on disk; so little is left by then.
    """
    done = threading.Event()

    def flush() -> None:
        while not done.wait(FLUSH_SECONDS):
            for path in list(files_of(folder)):
                with contextlib.suppress(OSError):  # renamed meanwhile; `seal` will say what is wrong
                    sync(path)

    thread = threading.Thread(target=flush, name="flush", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def seal(folder: Path, **facts: Any) -> None:
    """Bring every file of a folder to disk, and write its manifest: `facts`, and each file's size and hash."""
    paths = [path for path in files_of(folder) if path.name != MANIFEST]
    with ThreadPoolExecutor(2) as pool:
        synced = pool.map(sync, paths)
        hashes = list(pool.map(digest, paths))
        list(synced)  # raises what went wrong
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": found}
        for path, found in zip(paths, hashes)
    }
    body = json.dumps({"format": FORMAT, **facts, "files": files}, indent=1)
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(body + "\n")
        file.flush()
        os.fsync(file.fileno())
    for path in [*(entry for entry in folder.rglob("*") if entry.is_dir()), folder]:
        sync(path)


def publish(folder: Path, run: str | Path) -> Path:
    """Give a sealed folder its own name, in one rename; a checkpoint of the same step makes room before.

    Returns: where it is now.
    """
    place = Path(run) / folder.name
    if place.exists():
        delete(place)
    os.rename(folder, place)
    sync(place.parent)
    remove_tree(folder.parent)
    return place


def retain(run: str | Path, limit: int | None, keep: Collection[int] = (), newest: int | None = None) -> None:
    """Delete the oldest sealed checkpoints, by step, down to `limit`, and never fewer than two; `keep` stay.

    Steps above `newest`, which has just been saved, are those of an earlier run in the same folder: they go first.
    """
    if limit is None or limit <= 0:
        return
    steps = [step for step in checkpoints(run) if step not in keep]
    steps.sort(key=lambda step: (newest is None or step <= newest, step))
    room = max(limit, 2) - len(set(keep) & checkpoints(run).keys())
    for step in steps[: max(0, len(steps) - max(room, 1))]:
        delete(checkpoints(run)[step])


def delete(path: Path) -> None:
    """Delete a checkpoint: out of sight by a rename first, so that half of one is never seen."""
    trash = path.with_name(f"{DELETED}{path.name}")
    remove_tree(trash)
    os.rename(path, trash)
    remove_tree(trash)


def clean(run: str | Path) -> list[str]:
    """Remove what a killed save or deletion left behind. Returns: the names."""
    run = Path(run)
    found = [path for path in run.iterdir() if path.name.startswith((STAGED, DELETED))] if run.is_dir() else []
    for path in found:
        remove_tree(path)
    return sorted(path.name for path in found)


def remove_tree(path: Path) -> None:
    """Remove a folder if there is one; what another process removes meanwhile is fine."""
    shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Reading -----------------------------------------------------------------------------------------------------------


def checkpoints(run: str | Path) -> dict[int, Path]:
    """Step → checkpoint folder of a run, by step; dates play no part."""
    run = Path(run)
    found = run.iterdir() if run.is_dir() else ()
    return dict(sorted((int(match[1]), path) for path in found if (match := NAME.fullmatch(path.name))))


def last_whole(run: str | Path) -> Last:
    """The newest checkpoint that verifies."""
    skipped = []
    for path in reversed(checkpoints(run).values()):
        why = damage(path)
        if why is None:
            return Last(path, skipped)
        skipped.append(f"{path.name} is skipped: {why}")
    return Last(None, skipped)


def newest_checkpoint(run: str | Path) -> Last:
    """The newest whole checkpoint of a run. Raises: CheckpointError if there is none, with the reasons."""
    found = last_whole(run)
    if found.path is not None:
        return found
    if not found.skipped:
        raise CheckpointError(
            f"resume_from_checkpoint: {run} holds no checkpoint to go on from. Leave the option out to begin anew, or "
            "name a folder like runs/mine/checkpoint-100."
        )
    reasons = "".join(f"\n  {line}" for line in found.skipped)
    raise CheckpointError(
        f"resume_from_checkpoint: no checkpoint in {run} can be used:{reasons}\n"
        "Nothing was deleted. Restore a file from a copy, or begin anew in another output_dir."
    )


def named_checkpoint(path: Path, verified: Path | None = None) -> Path:
    """A checkpoint that a person named. Raises: CheckpointError if it is none, or damaged.

    Args:
        verified: a checkpoint whose hashes were compared already.
    """
    path = path.expanduser()
    if not (path / STATE_FILE).is_file():
        raise CheckpointError(
            f"resume_from_checkpoint: {path} holds no {STATE_FILE}, so it is no checkpoint. Name a folder like "
            "runs/mine/checkpoint-100, or say true for the last one in output_dir."
        )
    if manifest_of(path) is None:
        logger.warning("%s has no manifest, so another program wrote it: damage would not be noticed", path)
    elif path != verified and (why := damage(path)) is not None:
        raise CheckpointError(
            f"resume_from_checkpoint: {path} is damaged: {why}. Name an earlier one, or say true for the newest that "
            "is whole."
        )
    return path


def damage(folder: str | Path) -> str | None:
    """Why a checkpoint cannot be used, or `None` if every file of its manifest is as it was written."""
    folder = Path(folder)
    manifest = manifest_of(folder)
    if manifest is None:
        return f"no {MANIFEST} that can be read, so it was not written whole or not by tunesmith"
    if manifest.get("format") != FORMAT:
        return f"its {MANIFEST} has format {manifest.get('format')}, and this version reads {FORMAT}"
    sizes = {name: size_of(folder / name) for name in manifest["files"]}
    for name, written in manifest["files"].items():
        if sizes[name] is None:
            return f"{name} is missing"
        if sizes[name] != written["bytes"]:
            return f"{name} has {sizes[name]:,} bytes in place of {written['bytes']:,}"
    for name, written in manifest["files"].items():
        try:
            found = digest(folder / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        if found != written["xxh3_128"]:
            return f"{name} has changed since it was written (its hash is another)"
    return None


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """The manifest, or `None` where there is none that can be read."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else None


def size_of(path: Path) -> int | None:
    """Bytes of a file, `None` where there is none."""
    return path.stat().st_size if path.is_file() else None


def total_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in files_of(folder))


def files_of(folder: Path) -> Iterator[Path]:
    """The files of a folder and of those in it, by name."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def digest(path: Path) -> str:
    """xxh3_128 of a file's content: at memory speed, against damage and not against forgery."""
    found, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            found.update(buffer[:size])
    return found.hexdigest()
