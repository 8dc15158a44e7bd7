"""Small files for the tests of reading and loading."""

from tunesmith.data.load import load_rows
from tunesmith.data.report import Report


def load(path, **options):
    return load_rows(path, report=options.pop("report", Report()), **options)


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return str(path)


def values(rows):
    return [row.value for row in rows]
