"""The file of results of one kind of machine: rows under unique keys, as JSON, and as tables in Markdown."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from bench import report
from bench.machine import slug
from bench.report import Row


def row_key(row: Row) -> str:
    """What a number is a number of: a later run of the same replaces it."""
    parts = ("kind", "name", "backend", "case", "dtype", "device", "threads")
    return " | ".join(str(row[part]) for part in parts)


def result_path(folder: Path, machine: str) -> Path:
    """The JSON file of a kind of machine."""
    return folder / f"{slug(machine)}.json"


def read(path: Path) -> dict[str, Row]:
    """The rows of a file by their keys; none where there is no file.

    Raises:
        ValueError: the file is not one that `write` wrote.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {row_key(row): row for row in rows.values()}
    except FileNotFoundError:
        return {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"required is a file of results of this benchmark, got {path} ({error!r}); move it away"
        ) from error


def read_checks(path: Path) -> list[Row]:
    """What `bench.gpu_report` checked on this kind of machine; nothing where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")).get("checks", []) if path.exists() else []


def write(path: Path, new: Sequence[Row], checks: Sequence[Row] = ()) -> None:
    """Adds the rows to the file, in place of those with the same keys, and writes its tables anew. ``checks``, where
    given, take the place of the earlier ones: dicts with name, result, seconds, said, date and machine."""
    rows = read(path) | {row_key(row): row for row in new}
    checks = list(checks) or read_checks(path)
    ordered = dict(sorted(rows.items(), key=lambda item: _place(item[1])))
    contents = {"checks": checks, "rows": ordered} if checks else {"rows": ordered}
    _replace(path, json.dumps(contents, indent=1, allow_nan=False) + "\n")
    first = next(iter(ordered.values()), None) or checks[0]
    _replace(path.with_suffix(".md"), report.markdown(first["machine"], list(ordered.values()), checks))


def _place(row: Row) -> tuple:
    """Newest run first; in it the cases as they were measured."""
    return tuple(-ord(character) for character in row["date"]), row["number"]


def _replace(path: Path, text: str) -> None:
    """Under a temporary name first, so that an interrupted write leaves the old file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
