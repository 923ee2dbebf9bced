"""Tells what memory each optimizer takes of a model before anyone trains it: bytes of weights, gradients, optimizer
state, a step's transient memory and the checkpoint, on one GPU or on each of many under FSDP2."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hfac
from hfac.cli import arguments, findings, footprints, memory, sources
from hfac.cli.errors import UsageError
from hfac.cli.plan_plot import write_plot
from hfac.cli.report import print_rows

HELP = "tell what memory each optimizer takes of a model, before training"

HEADERS = ("optimizer", "weights", "gradients", "state", "transient", "total", "checkpoint")
_NOTES = (
    "H-Fac is hfac.HFac, SMMF hfac.SMMF. Where no fused backend serves the GPU (hfac doctor), their steps hold several "
    "copies of the largest parameter instead.",
    "GB is 10^9 bytes. Total is weights, gradients, state and transient memory; activations come on top, and under "
    "FSDP2 the weights and gradients that it gathers for a while. A checkpoint is weights and state of all ranks "
    "together. Buffers, such as the averages of batch norms, are not counted.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hfac plan``."""
    parser.add_argument("model", metavar="MODEL", help=sources.FORMS)
    meaning = "GPUs that FSDP2 cuts the model over, several numbers with commas between (default: 1)"
    parser.add_argument("--world-size", type=_world_sizes, default=[1], metavar="N[,N...]", help=meaning)
    meaning = "type of weights and gradients (default: %(default)s)"
    parser.add_argument("--dtype", choices=tuple(memory.DTYPES), default="bf16", help=meaning)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object, in bytes")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the memory as bars to a PNG, PDF or SVG file")


def _world_sizes(text: str) -> list[int]:
    return list(dict.fromkeys(arguments.positive_int(item) for item in text.split(",")))


def run(args: argparse.Namespace) -> int:
    """Print the plan and return the exit status, 0.

    Raises:
        UsageError: the model cannot be had, or the plot not be drawn.
    """
    model = sources.read(args.model)
    load = memory.Load(model, memory.DTYPES[args.dtype])
    worlds = {world: footprints.rows(load, world) for world in args.world_size}
    found = findings.find(model, load, args.world_size)
    if args.json:
        print(json.dumps(_as_json(model, load, worlds, found), indent=2))
    else:
        _print(model, load, worlds, found)
    if args.plot is not None:
        _plot(args.plot, model, worlds)
    return 0


def _print(model: sources.Model, load: memory.Load, worlds: dict, found: Sequence[findings.Finding]) -> None:
    for line in _wrapped(_described(model, load)):
        print(line)
    for world, rows in worlds.items():
        print()
        print("One GPU" if world == 1 else f"{world:,} GPUs under FSDP2: the fullest of them")
        print_rows(None, HEADERS, [_cells(row) for row in rows])
    print()
    for line in _transient_lines(worlds):
        print(line)
    for note in _NOTES:
        print(*_wrapped(note), sep="\n")
    print()
    if not found:
        print(f"Shapes: every parameter's state is at most {findings.SHARE:.0%} of AdamW's (float32) everywhere.")
        return
    serious, minor = ([finding for finding in found if finding.minor is kind] for kind in (False, True))
    if serious:
        intro = f"Shapes whose state is more than {findings.SHARE:.0%} of AdamW's (float32: 8 bytes per element):"
        print(*_wrapped(intro), sep="\n")
        for finding in serious:
            print(*_finding_head(finding), *_finding_reasons(finding), sep="\n")
    if minor:
        intro = f"{'Others' if serious else 'Shapes'} whose state is more than {findings.SHARE:.0%} of AdamW's"
        few = f"of less than {findings.FEW:.0%} of the parameters each, so that nothing need be done:"
        print(*_wrapped(f"{intro}, {few}"), sep="\n")
        for finding in minor:
            print(*_finding_head(finding), sep="\n")


def _described(model: sources.Model, load: memory.Load) -> str:
    total = sum(parameter.numel for parameter in model.parameters)
    trained = load.elements()
    some = f", {trained:,} of them trained" if trained != total else ""
    dtype = str(load.dtype).removeprefix("torch.")
    count = len(model.parameters)
    return (
        f"{model.title} ({model.source}): {total:,} parameters in {count:,} tensor{'s'[: count != 1]}{some}; "
        f"weights and gradients in {dtype}"
    )


def _cells(row: footprints.Row) -> list[str]:
    sizes = (row.weights, row.gradients, row.state, row.transient.bytes, row.total, row.checkpoint)
    return [row.optimizer.title, *map(memory.human, sizes)]


def _transient_lines(worlds: dict[int, list[footprints.Row]]) -> list[str]:
    """How the transient bytes are known, once for all numbers of ranks where it is the same."""
    said: dict[tuple[str, str, str], list[str]] = {}
    for world, rows in worlds.items():
        for row in rows:
            key = (row.optimizer.title, row.transient.basis, row.transient.origin)
            said.setdefault(key, []).append(f"{world:,}")
    lines = _wrapped("Transient memory is what a step holds for a while. How its bytes are known (measured: on CPUs):")
    for (title, basis, origin), on in sorted(said.items(), key=lambda item: _order(item[0][0])):
        where = "" if len(on) == len(worlds) else f" (on {', '.join(on)} GPU{'s'[: on != ['1']]})"
        lines += _wrapped(f"{title}{where}: {basis}; {origin}.", "  ", "    ")
    return lines


def _order(title: str) -> int:
    return [optimizer.title for optimizer in footprints.OPTIMIZERS.values()].index(title)


def _finding_head(finding: findings.Finding) -> list[str]:
    """What is concerned, and how much it takes."""
    who = footprints.OPTIMIZERS[finding.optimizer].title if finding.optimizer else "All"
    count = len(finding.parameters)
    first = finding.parameters[0]
    example = f"{first.name} ({findings.written(first.shape)})"
    what = f"{count:,} tensors, {finding.elements:,} elements, such as {example}" if count > 1 else example
    takes = ""
    if finding.adamw_bytes:
        share = finding.state_bytes / finding.adamw_bytes
        takes = f": {memory.human(finding.state_bytes)} of state, {share:.0%} of AdamW's"
    return _wrapped(f"{who}, {finding.kind}: {what}{takes}.", "  ", "    ")


def _finding_reasons(finding: findings.Finding) -> list[str]:
    return [*_wrapped(finding.why, "    ", "    "), *_wrapped(f"What to do: {finding.advice}", "    ", "    ")]


def _wrapped(text: str, first: str = "", later: str = "") -> list[str]:
    width = min(shutil.get_terminal_size().columns, 120)
    return textwrap.wrap(
        text,
        max(width, 60),
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _as_json(
    model: sources.Model, load: memory.Load, worlds: dict, found: Sequence[findings.Finding]
) -> dict[str, Any]:
    """Everything in bytes."""
    return {
        "hfac": hfac.__version__,
        "torch": str(torch.__version__),
        "model": {
            "title": model.title,
            "source": model.source,
            "tensors": len(model.parameters),
            "parameters": sum(parameter.numel for parameter in model.parameters),
            "trained_parameters": load.elements(),
        },
        "dtype": str(load.dtype).removeprefix("torch."),
        "world_sizes": [
            {"world_size": world, "optimizers": [_row_as_json(row, load) for row in rows]}
            for world, rows in worlds.items()
        ],
        "findings": [
            {
                "kind": finding.kind,
                "optimizer": finding.optimizer,
                "minor": finding.minor,
                "state_bytes": finding.state_bytes,
                "adamw_bytes": finding.adamw_bytes,
                "why": finding.why,
                "advice": finding.advice,
                "parameters": {parameter.name: list(parameter.shape) for parameter in finding.parameters},
            }
            for finding in found
        ],
    }


def _row_as_json(row: footprints.Row, load: memory.Load) -> dict[str, Any]:
    return {
        "optimizer": row.optimizer.name,
        "title": row.optimizer.title,
        "rank": row.rank.index,
        "weights_bytes": row.weights,
        "gradients_bytes": row.gradients,
        "state_bytes": row.state,
        "transient_bytes": row.transient.bytes,
        "transient_basis": row.transient.basis,
        "transient_origin": row.transient.origin,
        "total_bytes": row.total,
        "checkpoint_bytes": row.checkpoint,
    }


def _plot(path: Path, model: sources.Model, worlds: dict[int, list[footprints.Row]]) -> None:
    try:
        write_plot(path, model.title, worlds)
    except ModuleNotFoundError as missing:
        raise UsageError(
            f"--plot requires matplotlib ({missing}); install it with: {sys.executable} -m pip install matplotlib"
        ) from missing
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot requires a PNG, PDF or SVG file that can be written, got {path} ({error})") from error
    print(f"plot written to {path}", file=sys.stderr)
