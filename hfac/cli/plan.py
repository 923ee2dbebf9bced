"""Computes, without training, how much memory a model takes with each optimizer: bytes of weights, gradients, optimizer
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
from hfac.cli import arguments, findings, footprints, memory, outputs, sources
from hfac.cli.errors import OutputError, UsageError
from hfac.cli.foreign import told
from hfac.cli.plan_plot import write_plot
from hfac.cli.report import print_rows
from hfac.optim.param_groups import MASTER, ROUNDING
from hfac.optim.smmf import SIGNS

HELP = "compute how much memory a model takes with each optimizer"

HEADERS = ("optimizer", "weights", "gradients", "state", "transient", "total", "checkpoint")
_NOTES = (
    "HFac and SMMF: where no fused backend serves the GPU (hfac doctor), their steps hold several "
    "copies of the largest parameter instead.",
    "GB is 10^9 bytes. Total is weights, gradients, state and transient memory; activations come on top, and under "
    "FSDP2 the weights and gradients that it gathers temporarily. A checkpoint is weights and state of all ranks "
    "together. Buffers, such as the averages of batch norms, are not counted.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hfac plan``."""
    parser.add_argument("model", metavar="MODEL", help=sources.FORMS)
    meaning = "number of GPUs that FSDP2 shards the model over, or several numbers separated by commas (default: 1)"
    parser.add_argument("--world-size", type=_world_sizes, default=[1], metavar="N[,N...]", help=meaning)
    meaning = "type of weights and gradients (default: %(default)s)"
    parser.add_argument("--dtype", choices=tuple(memory.DTYPES), default="bf16", help=meaning)
    meaning = "parameters that are stacks, and how many of their leading dimensions index slices; may be repeated"
    parser.add_argument("--batch-dims", type=_stack, action="append", metavar="PATTERN=N", help=meaning)
    meaning = "fused weights, and of how many equal pieces they are made; may be repeated"
    parser.add_argument("--views", type=_stack, action="append", metavar="PATTERN=N", help=meaning)
    meaning = "fused weights that are cut along another dimension than their first, and that; may be repeated"
    parser.add_argument("--views-dim", type=_stack, action="append", metavar="PATTERN=DIM", help=meaning)
    meaning = "parameters whose moments HFac and SMMF keep whole; may be repeated"
    parser.add_argument("--dense", action="append", metavar="PATTERN", help=meaning)
    meaning = "master weights that HFac and SMMF keep beside bfloat16 weights (default: none)"
    parser.add_argument("--master", choices=MASTER, help=meaning)
    meaning = "how HFac and SMMF round bfloat16 weights; needs no memory (default: %(default)s)"
    parser.add_argument("--rounding", choices=ROUNDING, default=ROUNDING[0], help=meaning)
    meaning = "how SMMF keeps signs: a bit each, or a byte, which any placement can shard (default: %(default)s)"
    parser.add_argument("--signs", choices=SIGNS, default=SIGNS[0], help=meaning)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object, in bytes")
    meaning = "draw the memory as bars to a PNG, PDF or SVG file"
    parser.add_argument("--plot", type=outputs.picture, metavar="FILE", help=meaning)


def _world_sizes(text: str) -> list[int]:
    return list(dict.fromkeys(arguments.positive_int(item) for item in text.split(",")))


def _stack(text: str) -> tuple[str, int]:
    pattern, equals, count = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"required is PATTERN=N such as '*.experts.*=1', got {text!r}")
    return pattern, arguments.nonnegative_int(count)


def run(args: argparse.Namespace) -> int:
    """Print the plan and return the exit status: 0, or 1 if the plot could not be written after all.

    Raises:
        UsageError: the model cannot be read, options do not fit it, or the plot cannot be drawn.
    """
    dtype = memory.DTYPES[args.dtype]
    if dtype == torch.float32 and (args.master or args.rounding != ROUNDING[0]):
        raise UsageError(
            "--master and --rounding are for weights of fewer bits than the arithmetic's, got --dtype fp32; leave them "
            "out, or plan --dtype bf16"
        )
    if args.plot is not None:
        outputs.check_picture("--plot", args.plot)
    counts = (dict(given or ()) for given in (args.batch_dims, args.views, args.views_dim))
    model = sources.read(args.model).grouped(args.dense or (), *counts)
    model.check_pieces(args.world_size)
    load = memory.Load(model, dtype, args.rounding, args.master, args.signs)
    worlds = {world: footprints.rows(load, world) for world in args.world_size}
    found = findings.find(model, load, args.world_size)
    if args.json:
        print(json.dumps(_as_json(model, load, worlds, found), indent=2))
    else:
        _print(model, load, worlds, found)
    if args.plot is not None:
        sys.stdout.flush()  # so that the plan is out even if drawing fails
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
    _print_findings(found)
    if model.assumed:
        print()
        print(*_wrapped(f"Assumed: {' '.join(model.assumed)}"), sep="\n")


def _print_findings(found: Sequence[findings.Finding]) -> None:
    judged = [finding for finding in found if finding.optimizer]
    serious, minor = ([finding for finding in judged if finding.minor is kind] for kind in (False, True))
    if not judged:
        print(
            *_wrapped(f"Shapes: every parameter's state is at most {findings.SHARE:.0%} of AdamW's (float32)."),
            sep="\n",
        )
    if serious:
        intro = f"Shapes whose state is more than {findings.SHARE:.0%} of AdamW's (float32: 8 bytes per element):"
        print(*_wrapped(intro), sep="\n")
        for finding in serious:
            print(*_finding_head(finding), *_finding_reasons(finding), sep="\n")
    if minor:
        intro = f"{'Others' if serious else 'Shapes'} whose state is more than {findings.SHARE:.0%} of AdamW's"
        few = f"of less than {findings.FEW:.0%} of the parameters each, so that nothing needs to be done:"
        print(*_wrapped(f"{intro}, {few}"), sep="\n")
        for finding in minor:
            print(*_finding_head(finding), sep="\n")
    cut = [finding for finding in found if not finding.optimizer]
    if cut:
        print("Shapes that many GPUs cannot share evenly:")
        for finding in cut:
            print(*_finding_head(finding), *_finding_reasons(finding), sep="\n")


def _described(model: sources.Model, load: memory.Load) -> str:
    total = sum(parameter.numel for parameter in model.parameters)
    trained = load.elements()
    some = f", {trained:,} of them trained" if trained != total else ""
    dtype = str(load.dtype).removeprefix("torch.")
    count = len(model.parameters)
    return (
        f"{model.title} ({model.source}): {total:,} parameters in {count:,} tensor{'s'[: count != 1]}{some}; "
        f"weights and gradients in {dtype}{_options_told(model, load)}"
    )


def _options_told(model: sources.Model, load: memory.Load) -> str:
    """Options of HFac and SMMF that differ from their defaults, as text."""
    said = [f"master={load.master}"] if load.master else []
    said += [f"rounding={load.rounding}"] if load.rounding != ROUNDING[0] else []
    said += [f"signs={load.signs}"] if load.signs != SIGNS[0] else []
    for name, count in (
        ("dense", sum(parameter.dense for parameter in model.parameters)),
        ("batch_dims", sum(parameter.batch_dims > 0 for parameter in model.parameters)),
        ("views", sum(parameter.views > 1 for parameter in model.parameters)),
    ):
        if count:
            said.append(f"{name} for {count:,} tensor{'s'[: count != 1]}")
    return f"; HFac and SMMF with {', '.join(said)}" if said else ""


def _cells(row: footprints.Row) -> list[str]:
    sizes = (row.weights, row.gradients, row.state, row.transient.bytes, row.total, row.checkpoint)
    return [row.optimizer.title, *map(memory.human, sizes)]


def _transient_lines(worlds: dict[int, list[footprints.Row]]) -> list[str]:
    """How the transient bytes are known, once for all numbers of ranks if it is the same."""
    said: dict[tuple[str, str, str], list[str]] = {}
    for world, rows in worlds.items():
        for row in rows:
            key = (row.optimizer.title, row.transient.basis, row.transient.origin)
            said.setdefault(key, []).append(f"{world:,}")
    lines = _wrapped("Transient memory is what a step holds temporarily. How its bytes are known (measured: on CPUs):")
    for (title, basis, origin), on in sorted(said.items(), key=lambda item: _order(item[0][0])):
        where = "" if len(on) == len(worlds) else f" (on {', '.join(on)} GPU{'s'[: on != ['1']]})"
        lines += _wrapped(f"{title}{where}: {basis}; {origin}.", "  ", "    ")
    return lines


def _order(title: str) -> int:
    return [optimizer.title for optimizer in footprints.OPTIMIZERS.values()].index(title)


def _finding_head(finding: findings.Finding) -> list[str]:
    """Which parameters are concerned, and how much state they have."""
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
        max(width, 24),
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _as_json(
    model: sources.Model, load: memory.Load, worlds: dict, found: Sequence[findings.Finding]
) -> dict[str, Any]:
    """The plan as plain values, in bytes."""
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
        "rounding": load.rounding,
        "master": load.master,
        "signs": load.signs,
        "dense": [parameter.name for parameter in model.parameters if parameter.dense],
        "batch_dims": {parameter.name: parameter.batch_dims for parameter in model.parameters if parameter.batch_dims},
        "views": {each.name: [each.views, each.views_dim] for each in model.parameters if each.views > 1},
        "assumed": list(model.assumed),
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
    except Exception as error:  # matplotlib may raise anything; that the file can be written was checked before
        raise OutputError(f"the plan is printed, but {path} could not be drawn ({told(error)})") from error
    print(f"plot written to {path}", file=sys.stderr)
