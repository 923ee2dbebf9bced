"""The file of results of one kind of machine: rows under unique keys, as JSON, and as tables in Markdown."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import report
from bench.report import Row


def slug(machine: str) -> str:
    """A file name for a kind of machine."""
    return re.sub(r"[^a-z0-9.]+", "-", machine.lower()).strip("-")


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


def read_others(path: Path) -> Row:
    """What `bench.gpu_report` wrote beside the rows: "checks", a list, and "tables", lists of dicts by their titles."""
    return {"checks": [], "tables": {}} | _contents(path, "checks", "tables")


def write(
    path: Path, new: Sequence[Row], checks: Sequence[Row] = (), tables: Mapping[str, Sequence[Row]] | None = None
) -> None:
    """Adds the rows to the file, in place of those with the same keys, and writes its tables anew.

    ``checks`` take the place of the earlier ones of the same names: dicts with name, result, seconds, said, date and
    machine. ``tables`` take the place of the earlier ones of the same titles.
    """
    rows = read(path) | {row_key(row): row for row in new}
    others = read_others(path)
    known = {check["name"]: check for check in (*others["checks"], *checks)}
    tables = others["tables"] | {title: list(table) for title, table in (tables or {}).items()}
    ordered = dict(sorted(rows.items(), key=lambda item: _place(item[1])))
    contents = {"checks": list(known.values()), "tables": tables, "rows": ordered}
    _replace(
        path, json.dumps({k: v for k, v in contents.items() if v or k == "rows"}, indent=1, allow_nan=False) + "\n"
    )
    machine = next(iter((*ordered.values(), *known.values())))["machine"]
    text = report.markdown(machine, list(ordered.values()), list(known.values()), tables)
    _replace(path.with_suffix(".md"), text)


def _contents(path: Path, *keys: str) -> Row:
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {key: found[key] for key in keys if key in found}


def _place(row: Row) -> tuple:
    """Newest run first; in it the cases as they were measured."""
    return tuple(-ord(character) for character in row["date"]), row["number"]


def _replace(path: Path, text: str) -> None:
    """Under a temporary name first, so that an interrupted write leaves the old file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
