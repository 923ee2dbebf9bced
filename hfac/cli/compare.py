"""Train a small byte-level GPT on Python's own source text with each of several optimizers, from the same weights and
batches, and compare their validation loss, memory and time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hfac.cli import arguments, outputs
from hfac.cli.checkpoint import FILE_NAME, cannot_continue, load_checkpoint
from hfac.cli.corpus import load_corpus
from hfac.cli.errors import FAILED, INTERRUPTED, DamagedCheckpoint, OutputError, UsageError
from hfac.cli.foreign import told
from hfac.cli.optimizers import CHOICES, USUAL
from hfac.cli.plot import write_plot
from hfac.cli.progress import make_progress
from hfac.cli.report import best_runs, environment, print_table, write_json
from hfac.cli.runner import Comparison, StopRequest
from hfac.cli.settings import DTYPES, NAMES, SCHEDULES, Settings, flag, resolve
from hfac.optim.param_groups import MASTER, ROUNDING

HELP = "train a small GPT with several optimizers and compare loss, memory and time"
NUMBERS, PLOT = "compare.json", "compare.png"
SWEEP_FACTORS = (0.5, 1.0, 2.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hfac compare`."""
    add = parser.add_argument_group("what to compare").add_argument
    names = ", ".join(CHOICES)
    _setting(
        add,
        "optimizers",
        arguments.optimizer_names,
        f"any of {names}",
        shown=" ".join(USUAL),
        nargs="+",
        metavar="NAME",
    )
    meaning = "peak learning rate: one for all, or NAME=LR pairs"
    _setting(add, "lr", arguments.learning_rates, meaning, shown="one for each optimizer", nargs="+", metavar="LR")
    meaning = "train at each of these multiples of the learning rate, and report each optimizer at its best one"
    _setting(add, "lr_factors", arguments.positive_float, meaning, shown="1", nargs="+", metavar="F")
    meaning = "short for --lr-factors " + " ".join(f"{factor:g}" for factor in SWEEP_FACTORS)
    add(
        "--sweep", dest="lr_factors", action="store_const", const=SWEEP_FACTORS, default=argparse.SUPPRESS, help=meaning
    )
    _setting(add, "weight_decay", arguments.nonnegative_float, "weight decay of the matrices")
    _setting(add, "grad_clip", arguments.nonnegative_float, "largest norm of the gradient, 0 for no clipping")

    add = parser.add_argument_group("text").add_argument
    meaning = "files or directories to train on"
    _setting(add, "text", str, meaning, shown="the Python standard library's source", nargs="+", metavar="PATH")
    _setting(add, "max_bytes", arguments.positive_int, "read at most this much text")

    add = parser.add_argument_group("model and training").add_argument
    _setting(add, "d_model", arguments.positive_int, "width of the model")
    _setting(add, "layers", arguments.positive_int, "transformer blocks")
    _setting(add, "heads", arguments.positive_int, "attention heads, a divisor of the width")
    _setting(add, "context", arguments.positive_int, "bytes the model sees at once")
    _setting(add, "batch_size", arguments.positive_int, "windows of text per step")
    _setting(add, "steps", arguments.positive_int, "training steps per run")
    _setting(add, "warmup_steps", arguments.nonnegative_int, "steps of linear warmup", shown="a tenth of the steps")
    _setting(add, "schedule", str, "learning rate after the warmup, down to a tenth of its peak", choices=SCHEDULES)
    _setting(add, "eval_every", arguments.positive_int, "steps between evaluations", shown="a tenth of the steps")
    _setting(add, "eval_batches", arguments.positive_int, "validation batches per evaluation")
    _setting(add, "seed", arguments.seed, "seed of the initial weights and the batches")
    _setting(add, "device", arguments.device_name, "cpu, cuda or cuda:N")
    _setting(add, "dtype", str, "type of the parameters", choices=tuple(DTYPES))
    meaning = "how hfac and smmf round new bfloat16 parameters"
    _setting(add, "rounding", str, meaning, choices=ROUNDING)
    meaning = "master weights that hfac and smmf keep beside bfloat16 parameters"
    _setting(add, "master", str, meaning, shown="none", choices=MASTER)

    add = parser.add_argument_group("files").add_argument
    meaning = "where compare.json and compare.png go (default: %(default)s)"
    add("--out", type=outputs.folder, default=Path("compare-out"), metavar="DIR", help=meaning)
    add("--save", type=outputs.folder, metavar="DIR", help="keep a checkpoint in this directory")
    meaning = "steps between checkpoints (default: %(default)s)"
    add("--save-every", type=arguments.positive_int, default=100, metavar="N", help=meaning)
    meaning = "continue from the checkpoint in this directory, with its settings, and keep saving there (or in --save)"
    add("--resume", type=outputs.folder, metavar="DIR", help=meaning)


def _setting(add: Callable, name: str, kind: Callable, meaning: str, shown: str | None = None, **keywords: Any) -> None:
    """Add the option of a field of `Settings`.

    It has no default in argparse: what is left out comes from the checkpoint being resumed, or from Settings.
    """
    shown = getattr(Settings(), name) if shown is None else shown
    add(flag(name), type=kind, default=argparse.SUPPRESS, help=f"{meaning} (default: {shown})", **keywords)


def run(args: argparse.Namespace) -> int:
    """Run `hfac compare` and return its exit status: 0, 1 if a file could not be written, 130 after Ctrl-C.

    A file that cannot be written never costs results: training continues without the checkpoint, and the table is
    printed before any file is written.
    """
    checkpoint = None if args.resume is None else load_checkpoint(args.resume)
    try:
        settings = resolve(_given(args), None if checkpoint is None else checkpoint["settings"])
    except DamagedCheckpoint as error:
        raise cannot_continue(args.resume, checkpoint or {}, error) from error
    corpus = load_corpus(settings.text, settings.max_bytes, settings.context)
    if checkpoint is not None and checkpoint["text_sha256"] != corpus.sha256:
        raise UsageError(
            f"--resume requires the text the checkpoint was trained on, and {corpus.source} has changed since (SHA-256"
            f" was {checkpoint['text_sha256'][:12]}..., is {corpus.sha256[:12]}...); restore it or start anew"
        )
    save_to = _make_directories(args)
    comparison = Comparison(settings, corpus, save_to, args.save_every)
    if checkpoint is not None:
        try:
            comparison.resume(checkpoint)
        except DamagedCheckpoint as error:
            raise cannot_continue(args.resume, checkpoint, error) from error
    _print_heading(comparison)
    if checkpoint is not None:
        _print_resumed(comparison, checkpoint)

    status = 0
    failure: Exception | None = None
    writing = _Writing()
    with StopRequest() as stop:
        try:
            with make_progress() as progress:
                while not comparison.complete:
                    comparison.train_next(progress, stop, writing.attempt)
                    # after every run, so that a later failure costs less
                    writing.attempt(_write_numbers, args.out, comparison)
        except KeyboardInterrupt:
            status = INTERRUPTED
            saved = save_to is not None and not writing.failed
            print(f"\nInterrupted. Continue with: --resume {save_to}" if saved else "\nInterrupted.")
        except OSError as error:  # of standard output, between two steps
            failure = error
            writing.attempt(comparison.save)
        except Exception as error:
            failure = error
    if comparison.results:
        try:
            print()
            print_table(comparison.results, settings.steps)
            sys.stdout.flush()
        except OSError as error:
            failure = failure or error
        writing.attempt(_write_numbers, args.out, comparison)
        if not isinstance(failure, BrokenPipeError):  # whoever has stopped reading looks at no picture either
            writing.attempt(_write_plot, args.out, comparison)
    if failure is not None:
        raise failure
    return status or (FAILED if writing.failed else 0)


class _Writing:
    """Writes files without ending the training if that fails: errors are reported on standard error."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    @property
    def failed(self) -> bool:
        """Whether anything could not be written."""
        return bool(self._told)

    def attempt(self, write: Callable, *arguments: object) -> None:
        """Call ``write`` with the arguments; if it fails, report why, each reason once."""
        try:
            write(*arguments)
        except BrokenPipeError:
            raise
        except (OSError, OutputError) as error:
            reason = " ".join(str(error).split())
            if reason not in self._told:
                with suppress(OSError):
                    print(f"hfac compare: error: {reason}", file=sys.stderr, flush=True)
            self._told.add(reason)


def _given(args: argparse.Namespace) -> dict:
    """The settings given on the command line, as `Settings` holds them."""
    given = {name: getattr(args, name) for name in NAMES if hasattr(args, name)}
    for name in ("optimizers", "lr"):  # these may be given in several words, each of several items
        if name in given:
            given[name] = dict.fromkeys(item for items in given[name] for item in items)
    return {name: tuple(value) if isinstance(value, (list, dict)) else value for name, value in given.items()}


def _make_directories(args: argparse.Namespace) -> Path | None:
    """Create the output directories before training starts, and return the one for checkpoints, if any."""
    save_to = args.resume if args.save is None else args.save
    if save_to is not None and save_to != args.resume and (save_to / FILE_NAME).exists():
        raise UsageError(
            f"--save requires a directory without a checkpoint, and {save_to} holds one; continue it with --resume"
            f" {save_to}, or remove it, or give another directory"
        )
    outputs.check_folder("--out", args.out, (NUMBERS, PLOT))
    if save_to is not None:
        outputs.check_folder("--save", save_to, (FILE_NAME,))
    return save_to


def _print_heading(comparison: Comparison) -> None:
    settings, corpus = comparison.settings, comparison.corpus
    size = len(corpus.train) + len(corpus.validation)
    print(
        f"Text: {size:,} bytes in {corpus.files} files of {corpus.source}, the last {len(corpus.validation):,} held out"
        " for validation."
    )
    print(
        f"Model: byte-level GPT, width {settings.d_model}, {settings.layers} layers, context {settings.context}, in"
        f" {settings.dtype} on {settings.device}{_stored(settings)}."
    )
    print(
        f"Training: {len(comparison.plan)} runs of {settings.steps:,} steps, {settings.batch_size} x {settings.context}"
        " bytes each."
    )


def _stored(settings: Settings) -> str:
    said = ", hfac and smmf round stochastically" if settings.rounding == "stochastic" else ""
    return said + (f", master={settings.master}" if settings.master else "")


def _print_resumed(comparison: Comparison, checkpoint: dict) -> None:
    print(f"Resumed: {len(comparison.finished)} of {len(comparison.plan)} runs were finished before.")
    now = environment(comparison.settings.device)
    for name, before in checkpoint["environment"].items():
        if before != now.get(name):
            print(f"Note: {name} was {before} and is {now.get(name)}; the last digits of the losses may differ for it.")


def _write_numbers(directory: Path, comparison: Comparison) -> None:
    settings, corpus, runs = comparison.settings, comparison.corpus, comparison.results
    report = {
        "complete": comparison.complete,
        "settings": settings.as_dict() | {"warmup_steps": settings.warmup, "eval_every": settings.eval_interval},
        "text": {
            "source": corpus.source,
            "files": corpus.files,
            "train_bytes": len(corpus.train),
            "validation_bytes": len(corpus.validation),
            "sha256": corpus.sha256,
        },
        "environment": environment(settings.device),
        "best": {run["optimizer"]: {"lr": run["lr"], "val_loss": run["val_loss"]} for run in best_runs(runs)},
        "runs": runs,
    }
    try:
        write_json(directory / NUMBERS, report)
    except OSError as error:
        raise OutputError(f"{directory / NUMBERS} could not be written ({told(error)})") from error


def _write_plot(directory: Path, comparison: Comparison) -> None:
    said = [f"Numbers: {directory / NUMBERS}"] if (directory / NUMBERS).exists() else []
    try:
        write_plot(directory / PLOT, comparison.results)
        said.append(f"Plot:    {directory / PLOT}")
    except ModuleNotFoundError as missing:
        said.append(
            f"Plot skipped: it requires matplotlib ({missing}); install it with: python -m pip install matplotlib"
        )
    except Exception as error:  # matplotlib's, of any kind
        raise OutputError(f"{directory / PLOT} could not be drawn ({told(error)})") from error
    finally:
        print("", *said, sep="\n")
