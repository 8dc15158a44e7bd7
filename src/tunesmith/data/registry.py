"""Names of datasets become `Source`s: entries of `dataset_info.json`, files, folders, Hub ids.

A name in the registry wins over a file or folder of the same name, so that a recipe means the same wherever it is run;
`./name` is the file. The registry is data: nothing that it names lies outside its folder, and nothing in it is run.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from tunesmith.data.formats import columns_of
from tunesmith.data.load import looks_like_hub_id
from tunesmith.data.normalize import MEDIA
from tunesmith.data.readers import READERS
from tunesmith.data.report import Report, visible
from tunesmith.data.rows import RowError
from tunesmith.errors import ConfigError, DataError
from tunesmith.lookup import did_you_mean

logger = logging.getLogger(__name__)

FILE = "dataset_info.json"
FORMATTING = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
NOT_READ = ("ms_hub_url", "om_hub_url", "cloud_file_name")
TYPES: dict[str, type] = {
    "hf_hub_url": str,
    "script_url": str,
    "file_name": str,
    **dict.fromkeys(NOT_READ, str),
    "file_sha1": str,
    "formatting": str,
    "ranking": bool,
    "subset": str,
    "split": str,
    "folder": str,
    "revision": str,
    "num_samples": int,
    "columns": dict,
    "tags": dict,
}
WORDS = {str: "a text", bool: "true or false", int: "a whole number", dict: "an object of texts"}
# The registry's name of a column → ours.
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
COLUMNS = ALPACA | {
    name: name for name in ("history", "messages", "system", "tools", "chosen", "rejected", "kto_tag", *MEDIA)
}
# The registry's name of a role's tag → the role, as `normalize.ROLES` knows it.
ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
TAGS = {"role_tag": "from", "content_tag": "value"} | dict.fromkeys(ROLE_TAGS)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
MAX_BYTES = 32 * 2**20  # of a registry; a data file named so by mistake is not read whole


class Source(NamedTuple):
    """Where the rows of one dataset come from and how they are read."""

    name: str
    """As the person wrote it."""
    place: str
    """File, folder or Hub id."""
    is_hub: bool = False
    is_registered: bool = False
    """An entry of `dataset_info.json` says how it is read; then only the columns that it names are."""
    root: str | None = None
    """Folder that a registered file must lie in."""
    split: str = "train"
    subset: str | None = None
    folder: str | None = None
    """Folder inside a Hub dataset."""
    revision: str | None = None
    format: str | None = None
    """Name in `FORMATS`, or `file.py:function` from a recipe. `None`: detected."""
    columns: Mapping[str, str] | None = None
    """Our column name → the rows'."""
    tags: Mapping[str, str] | None = None
    """`role_tag`, `content_tag`, `user_tag`, ... → what the turns call them."""
    ranking: bool | None = None
    """Rows hold a better and a worse answer. `None`: no registry says."""
    system_prompt: str | None = None
    num_samples: int | None = None
    file_sha1: str | None = None


def find_sources(
    names: str | Path | Sequence[str | Path] | None,
    dataset_dir: str | Path = "data",
    *,
    split: str = "train",
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    system_prompt: str | Sequence[str] | None = None,
) -> list[Source]:
    """The sources of a list of names, or of a text with commas between them.

    Args:
        names: entries of the registry, files, folders, Hub ids.
        dataset_dir: the registry's folder; it may lack one as long as no name needs it.
        split: of Hub datasets whose entry names none.
        format, columns: of files, folders and Hub ids; an entry of the registry says its own.
        system_prompt: one for all, or one for each name (also as a text with `|` between them).

    Raises: ConfigError for an undefined name, an entry that is wrong, or a number of system prompts that does not fit.
    """
    listed, dataset_dir = list_names(names), os.path.expanduser(dataset_dir)
    prompts = _system_prompts(system_prompt, len(listed))
    entries = read_entries(dataset_dir)
    found = []
    for name, prompt in zip(listed, prompts):
        if name in entries:
            source = entry_source(name, entries[name], dataset_dir, split)
        else:
            source = _unregistered(name, entries, dataset_dir)._replace(split=split, format=format, columns=columns)
        found.append(source._replace(system_prompt=prompt))
    return found


def list_names(names: str | Path | Sequence[str | Path] | None) -> list[str]:
    """`"a, b"` and `["a", "b"]` alike; a file whose own name holds a comma is one name."""
    if names is None:
        return []
    if not isinstance(names, (str, Path)):
        return [name for item in names for name in list_names(item)]
    text = str(names)
    if "," not in text or os.path.exists(os.path.expanduser(text)):
        return [text.strip()] if text.strip() else []
    return [part.strip() for part in text.split(",") if part.strip()]


def _system_prompts(given: str | Sequence[str] | None, number: int) -> list[str | None]:
    if given is None or isinstance(given, str):
        parts = given.split("|") if given and number > 1 else [given]
    else:
        parts = list(given)
    if len(parts) not in (1, number) and number:
        raise ConfigError(
            f"system_prompt: {len(parts)} are given for {number} dataset{'s' * (number != 1)}. Give one, or one for "
            f"each of the {number} datasets."
        )
    prompts = [part.strip() if isinstance(part, str) and len(parts) > 1 else part for part in parts]
    return prompts * number if len(prompts) == 1 else prompts[:number]


def _unregistered(name: str, entries: Mapping[str, Any], dataset_dir: str | Path) -> Source:
    """A name that is no entry: a path or a Hub id, or a name that somebody thought was an entry."""
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return Source(name, path)
    if looks_like_hub_id(name):
        return Source(name, name, is_hub=True)
    if Path(name).suffix.lower() in READERS or os.path.basename(name) != name:
        return Source(name, path)  # reading it says that it is absent, and names its neighbours
    registry = os.path.join(dataset_dir, FILE)
    if not os.path.exists(registry):
        raise ConfigError(
            f"Undefined dataset {visible(name, 80)}: it is no file or folder here, and dataset_dir ({dataset_dir}) "
            f"has no {FILE} that could name it. Set dataset_dir to the folder of {FILE}, or name a file or a Hub id "
            "owner/name."
        )
    raise ConfigError(
        f"Undefined dataset {visible(name, 80)} in {FILE} ({registry}).{did_you_mean(name, entries)} Add an entry "
        f'"{visible(name, 80)}": {{"file_name": ...}} there, or name a file or a Hub id owner/name.'
    )


# The registry ------------------------------------------------------------------------------------------------------


def read_entries(dataset_dir: str | Path) -> dict[str, Any]:
    """The registry as it is written; empty where there is none.

    Raises: ConfigError for a file that is no JSON object.
    """
    path = os.path.join(dataset_dir, FILE)
    if not os.path.isfile(path):
        return {}
    if os.path.getsize(path) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES // 2**20} MiB, so it is no registry of datasets.")
    try:
        entries = json.loads(Path(path).read_bytes().decode("utf-8-sig"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}. Mend the file there.") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable: {visible(str(error), 80)}. Write it as UTF-8 JSON.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not isinstance(entries, dict):
        raise ConfigError(f'{path}: expected an object {{"name": {{"file_name": ...}}, ...}}. Write one.')
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"{FILE} has the key '{visible(key, 60)}' twice in one object. Remove one of them.")
        found[key] = value
    return found


def entry_source(name: str, entry: Any, dataset_dir: str | Path, split: str = "train") -> Source:
    """One entry of the registry as a source; null is as good as absent.

    Where there are several, `hf_hub_url` is read before `script_url` and that before `file_name`.

    Raises: ConfigError for unknown keys, values of another type, a place outside the registry's folder, or none.
    """
    where = f"{os.path.join(dataset_dir, FILE)}: {visible(name, 80)}"
    if not isinstance(entry, dict):
        raise ConfigError(f'{where}: expected an object such as {{"file_name": "mine.json"}}.')
    _check_keys(entry, TYPES, where)
    given = {key: value for key, value in entry.items() if value not in (None, "")}
    for key, value in given.items():
        if not isinstance(value, TYPES[key]) or (TYPES[key] is int and (isinstance(value, bool) or value < 1)):
            raise ConfigError(f"{where}: {key}: expected {WORDS[TYPES[key]]}, got {visible(repr(value), 60)}.")
    formatting = given.get("formatting", "alpaca")
    if formatting not in FORMATTING:
        hint = did_you_mean(formatting, FORMATTING)
        raise ConfigError(f"{where}: unknown formatting '{formatting}'.{hint} Known: {', '.join(FORMATTING)}.")
    ranking = given.get("ranking", False)
    return Source(
        name=name,
        is_registered=True,
        split=given.get("split", split),
        format="preference" if ranking else FORMATTING[formatting],
        columns=_columns(given.get("columns"), formatting, where),
        tags=_tags(given.get("tags"), where) if formatting != "alpaca" else None,
        ranking=ranking,
        **{key: given[key] for key in ("subset", "num_samples", "file_sha1") if key in given},
        **_place(given, dataset_dir, where),
    )


def _check_keys(given: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key '{visible(key, 60)}'.{did_you_mean(key, known)} Known: {', '.join(known)}."
            )


def _columns(given: Mapping[str, Any] | None, formatting: str, where: str) -> dict[str, str]:
    """Our column → theirs. An entry that names columns names all that are read; turns stand under a default name."""
    turns = "messages" if formatting == "openai" else "conversations"
    if given is None:
        return {name: name for name in ALPACA.values()} if formatting == "alpaca" else {turns: turns}
    _check_keys(given, COLUMNS, f"{where}: columns")
    _check_texts(given, f"{where}: columns")
    found = {turns if key == "messages" else COLUMNS[key]: column for key, column in given.items() if column}
    return found if formatting == "alpaca" else {turns: turns} | found


def _tags(given: Mapping[str, Any] | None, where: str) -> dict[str, str] | None:
    if given is None:
        return None
    _check_keys(given, TAGS, f"{where}: tags")
    _check_texts(given, f"{where}: tags")
    return {key: tag for key, tag in given.items() if tag}


def _check_texts(given: Mapping[str, Any], where: str) -> None:
    for key, value in given.items():
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{where}: {key}: expected a text, got {visible(repr(value), 60)}.")


# Places ------------------------------------------------------------------------------------------------------------


def _place(given: Mapping[str, Any], dataset_dir: str | Path, where: str) -> dict[str, Any]:
    """Fields of the `Source` that say where it lies."""
    if "hf_hub_url" in given:
        name = given["hf_hub_url"]
        if not HUB_NAME.fullmatch(name) or ".." in name:
            raise ConfigError(f"{where}: hf_hub_url: expected a Hub id owner/name, got {visible(repr(name), 80)}.")
        folder = given.get("folder")
        if folder is not None and _leads_out(folder):
            raise ConfigError(f"{where}: folder: expected a folder inside {name}, got {visible(repr(folder), 80)}.")
        return {"place": name, "is_hub": True, "folder": folder, "revision": given.get("revision")}
    if "script_url" in given:
        raise ConfigError(
            f"{where}: script_url names a loading script, which would run code of the dataset and which `datasets` no "
            "longer runs. Write file_name (a file or folder beside the registry) or hf_hub_url (owner/name) instead."
        )
    if "file_name" in given:
        root = os.fspath(dataset_dir)
        check_inside(root, given["file_name"], where)
        return {"place": os.path.join(root, given["file_name"]), "root": root}
    other = next((key for key in NOT_READ if key in given), None)
    what = f"{other} is not read" if other else "it names no place"
    raise ConfigError(
        f"{where}: {what}. Download the data and write file_name (beside the registry), or write hf_hub_url."
    )


def _leads_out(name: str) -> bool:
    """Whether a relative name is none: absolute, with `..`, a URL, or with a NUL."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return (
        "://" in name or "\0" in name or any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)
    )


def check_inside(root: str, name: str, where: str) -> None:
    """Refuse a file that does not lie in the registry's folder, links followed.

    Raises: ConfigError.
    """
    inside = not _leads_out(name) and Path(root, name).resolve().is_relative_to(Path(root).resolve())
    if not inside:
        raise ConfigError(
            f"{where}: file_name {visible(repr(name), 80)} is refused: it must name a file or folder inside {root}, "
            "without '..', absolute paths, URLs or links that lead out. Copy the data there, or name the file in the "
            "recipe's dataset."
        )


def check_files(source: Source, files: Sequence[str], report: Report) -> None:
    """Refuse files that links bring in from outside, and compare the SHA-1 sum; one that differs only warns.

    The sum guards against a file that was replaced by mistake; it is no protection against an attacker.

    Raises: ConfigError for a file outside the registry's folder.
    """
    for file in files if source.root is not None else ():
        check_inside(source.root, os.path.relpath(file, source.root), f"{FILE}: {source.name}")
    if not source.is_registered or source.is_hub:
        return
    if source.file_sha1 is None:
        logger.debug("%s: %s names no file_sha1, so the file is not checked.", source.name, FILE)
    elif len(files) != 1:
        _warn(report, f"{source.name}: file_sha1 is not checked, because it is the sum of one file, not {len(files)}")
    elif (found := _sha1(files[0])) != source.file_sha1.strip().lower():
        what = f"{source.name}: {files[0]} has the SHA-1 sum {found}, not {visible(source.file_sha1, 50)} as {FILE}"
        _warn(report, f"{what} says: it was changed, or the entry is old (read all the same)")


def _sha1(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.sha1(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _warn(report: Report, text: str) -> None:
    logger.warning("%s", text)
    report.note(text)


# Rows --------------------------------------------------------------------------------------------------------------


def under_our_names(value: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The columns that a registry's entry names, under our names, their turns under our tags.

    Raises: RowError where the column that the entry cannot do without is absent, or a turn has not the entry's tags.
    """
    theirs = next((source.columns[name] for name in ("instruction", *TURNS) if name in source.columns), None)
    if theirs is not None and theirs not in value:
        what = f"{FILE} reads '{theirs}', but the row has {columns_of(value)}.{did_you_mean(theirs, map(str, value))}"
        raise RowError(f"{what} Mend columns or formatting of the entry {visible(source.name, 60)}.", "missing-column")
    found = {ours: value[theirs] for ours, theirs in source.columns.items() if theirs in value}
    if source.tags:
        for name in (*TURNS, "chosen", "rejected"):
            if isinstance(found.get(name), dict):
                found[name] = _retagged(found[name], source.tags, 1)
            elif isinstance(found.get(name), (list, tuple)):
                found[name] = [_retagged(turn, source.tags, n) for n, turn in enumerate(found[name], 1)]
    return found


TURNS = ("conversations", "messages")


def _retagged(turn: Any, tags: Mapping[str, str], number: int) -> Any:
    """A turn with `role` and `content`; a role that has no tag of its own keeps its name."""
    if not isinstance(turn, dict):
        return turn
    role_tag, content_tag = (tags.get(key, TAGS[key]) for key in ("role_tag", "content_tag"))
    if turn.get(role_tag) is None:
        what = f"turn {number} has no '{visible(role_tag, 40)}', which {FILE} names as role_tag; it has"
        raise RowError(f"{what} {columns_of(turn)}. Mend the entry's tags.", "unknown-role")
    roles = {tags[key]: role for key, role in ROLE_TAGS.items() if key in tags}
    rest = {key: item for key, item in turn.items() if key not in (role_tag, content_tag)}
    role = turn[role_tag]
    renamed = {"role": roles.get(role, role) if isinstance(role, str) else role}
    return rest | renamed | ({"content": turn[content_tag]} if content_tag in turn else {})
