"""Small files for the tests of reading and loading."""

from itertools import islice

from tunesmith.data.load import good_rows
from tunesmith.data.registry import find_sources
from tunesmith.data.report import Report
from tunesmith.data.sources import source_rows


def load(names, *, report=None, on_bad_row="error", max_samples=None, split="train"):
    """The rows of files, folders and Hub ids, as a run reads them."""
    report, rows = report or Report(), []
    for source in find_sources(names, dataset_dir="no registry", split=split):
        rows += islice(good_rows(source_rows(source, report), on_bad_row, report), max_samples)
    return rows


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return str(path)


def values(rows):
    return [row.value for row in rows]
