"""What is printed: what every column means, and one table per case; the same tables as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]

#: column -> what it means, for a reader who has never seen the code
COLUMNS = {
    "what": "a name ending in _ is one kernel call over the whole list; else the whole step() of that optimizer",
    "backend": "how it is carried out: cpu, triton, cuda are fused kernels of hfac, reference is plain torch",
    "ms": "time of one call over the whole list in milliseconds, the median of the rounds",
    "20-80%": "the quantiles of 20 and 80 % of the same: how much the rounds differ",
    "ns/param": "the median per parameter (element), in nanoseconds",
    "B/param": "bytes per parameter that a step of this algorithm must move at the least (gradient read, parameter and "
    "state read and written). A range: the gradient is needed twice, the second time from a cache or from memory",
    "GB/s": "those bytes divided by the median: useful bandwidth. What temporaries move is not in it",
    "of copy": "that bandwidth as a share of a plain copy's, timed in the same rounds; lists that fit the caches can "
    "exceed 100 %",
    "x AdamW": "how many times as fast as torch.optim.AdamW(fused=True) on the same list: ratio of the medians and, in "
    "brackets, the quantiles of 20 and 80 % of the ratios round by round; followed by ? where the machine was too "
    "busy for the ratio to mean much",
    "x ref": "how many times as fast as the same thing in plain torch (the reference)",
    "x eager": "SMMF only: how many times as fast as an SMMF written the usual way in eager torch",
    "temp B": "peak of the memory held for a while during the step, with the workspace that is kept from step to step, "
    "in bytes per parameter",
    "state B": "memory of the optimizer's state, in bytes per parameter",
    "launches": "kernels that one call launches on the GPU",
}


def legend() -> str:
    """The meaning of every column, in lines of at most 120 characters."""
    width = max(map(len, COLUMNS))
    lines = []
    for name, meaning in COLUMNS.items():
        line = f"  {name:<{width}}  "
        for word in meaning.split():
            if len(line) + len(word) > 118:
                lines.append(line.rstrip())
                line = " " * (width + 4)
            line += word + " "
        lines.append(line.rstrip())
    return "\n".join(lines)


def setting(row: Row) -> str:
    """Machine, versions and commit of a row, in one line."""
    extension = row["extension"]
    native = f"hfac._C by {extension['compiler']} using {extension['isa']}" if extension else "hfac._C not built"
    commit = "no git commit" if row["commit"] is None else row["commit"][:10] + (" + changes" if row["dirty"] else "")
    return (
        f"{row['machine']}, {row['cores']} cores, {row['threads']} threads; Python {row['python']}, torch "
        f"{row['torch']}, hfac {row['hfac']} ({commit}), {native}; {row['date']}"
    )


def case_title(row: Row) -> str:
    """What the rows of one table have in common."""
    return (
        f"{row['shapes']}, {row['dtype']}: {row['tensors']:,} tensors, {row['parameters']:,} parameters; "
        f"copy {row['copy_gb_per_s']:.3g} GB/s"
    )


def cells(row: Row) -> list[str]:
    """One row of a table, in the order of `COLUMNS`."""
    faster = row["speedup"]

    def times(rival: str) -> str:
        return f"{faster[rival]['median']:.3g}" if rival in faster else ""

    adamw = faster.get("AdamW, torch fused")
    return [
        row["name"],
        row["backend"],
        _digits(row["ms"]),
        f"{_digits(row['ms_q20'])}-{_digits(row['ms_q80'])}",
        _digits(row["ns_per_param"]),
        _range(row["bytes_per_param"], row["bytes_per_param_reread"], "{:.4g}"),
        _range(row["gb_per_s"], row["gb_per_s_reread"], "{:.3g}"),
        _range(100 * row["copy_share"], 100 * row["copy_share_reread"], "{:.0f}") + "%",
        f"{adamw['median']:.2f} [{adamw['q20']:.2f}-{adamw['q80']:.2f}]{'?' * is_noisy(row)}" if adamw else "",
        times("reference"),
        times("SMMF, eager torch"),
        f"{row['transient_bytes_per_param'] + row['kept_bytes_per_param']:.3g}",
        f"{row['state_bytes_per_param']:.3g}",
        "" if row["launches"] is None else str(row["launches"]),
    ]


#: quantiles of 80 and of 20 % of a ratio that lie further apart say little
_APART = 2.0


def is_noisy(row: Row) -> bool:
    """Whether the ratio to AdamW means little: it lies outside the quantiles of the rounds' ratios, or these lie far
    apart."""
    adamw = row["speedup"].get("AdamW, torch fused")
    if adamw is None:
        return False
    return not adamw["q20"] <= adamw["median"] <= adamw["q80"] or adamw["q80"] > _APART * adamw["q20"]


def noise(rows: Sequence[Row]) -> str | None:
    """A warning where ratios of a table are not to be trusted."""
    noisy = [f"{row['name']} {row['backend']}" for row in rows if is_noisy(row)]
    if not noisy:
        return None
    return (
        f"Noisy: the ratio to AdamW of {', '.join(noisy)} lies outside its own brackets, or these are wide. Measure "
        "again when nothing else runs, or with more --rounds."
    )


def text_table(rows: Sequence[Row]) -> str:
    """Aligned columns for a terminal or a log."""
    table = [list(COLUMNS), *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def markdown(
    machine: str,
    rows: Sequence[Row],
    checks: Sequence[Row] = (),
    tables: Mapping[str, Sequence[Row]] | None = None,
) -> str:
    """The whole file of a machine: what was checked there, tables by their titles, and one table per case, grouped by
    what the rows were measured with."""
    parts = [f"# {machine}", "Written by `python -m bench`; the numbers in full stand in the JSON file beside it."]
    if checks:
        lines = ["| check | result | seconds | what it said last | when |", "| --- | --- | ---: | --- | --- |"]
        for c in checks:
            lines.append(
                f"| {c['name']} | {c['result']} | {c['seconds']:.0f} | {_cell(c['said'])} | {c['date'][:16]} |"
            )
        parts.append("## Checks\n\n" + "\n".join(lines))
    parts += [f"## {title}\n\n{plain_table(table)}" for title, table in (tables or {}).items() if table]
    if not rows:
        return "\n\n".join(parts) + "\n"
    parts.append("\n".join(f"- **{name}**: {meaning}" for name, meaning in COLUMNS.items()))
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["case"], row["date"]), []).append(row)
    shown = None
    for members in cases.values():
        if setting(members[0]) != shown:
            shown = setting(members[0])
            parts.append(f"## {shown}")
        lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in members]
        parts.append(f"### {case_title(members[0])}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def plain_table(rows: Sequence[Row]) -> str:
    """Markdown of dicts, each a row; raw samples (lists) are left to the JSON file."""
    heads = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list)))
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for row in rows:
        values = (row.get(head, "") for head in heads)
        texts = (f"{value:.4g}" if isinstance(value, float) else _cell(str(value)) for value in values)
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else f"{value:.2g}"


def _range(low: float, high: float, form: str) -> str:
    ends = dict.fromkeys((form.format(low), form.format(high)))
    return "-".join(ends)
