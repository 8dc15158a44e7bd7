"""Small registries and data files for the tests of names, collecting and streaming."""

import json

from tunesmith.config import DataConfig
from tunesmith.data.collect import collect


def make_registry(folder, **entries):
    """`dataset_info.json` in the folder, which is returned as the `dataset_dir`."""
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return str(folder)


def make_file(folder, name, rows):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return str(path)


def alpaca(number, word="row", **columns):
    """Rows that differ: `row0`, `row1`, ..."""
    return [{"instruction": f"{word}{index}", "output": f"{index}"} | columns for index in range(number)]


def gather(folder, names, **options):
    """`collect`, whose own keywords stand beside the options."""
    own = {key: options.pop(key) for key in ("stage", "seed", "held_out_only", "answers_needed") if key in options}
    return collect(DataConfig(dataset=names, dataset_dir=str(folder), **options), **own)


def asked(examples):
    """The first user turn of every example, which tells rows apart."""
    return [next(m["content"] for m in e.get("messages", e.get("prompt")) if m["role"] == "user") for e in examples]
