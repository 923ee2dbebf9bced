"""The command line of the study: ``python -m bench.quality``."""

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from bench.machine import ROOT, describe
from bench.quality import grid, scale, tables
from bench.quality.contenders import BASE, CONTENDERS
from bench.quality.runs import ALL_TASKS
from bench.quality.study import Cell, Plan, Study
from bench.quality.tasks import SCALE, TASKS
from hfac.cli import arguments, outputs
from hfac.cli.errors import FAILED, INTERRUPTED, UsageError
from hfac.cli.report import write_json

PAGE = ROOT / "docs" / "quality.md"
STEPS = 1800


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing, writes tables and pictures, and returns the exit status: 0, 1 where a run failed, 130
    after Ctrl-C."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        return run(args)
    except UsageError as error:
        parser.error(str(error))


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description="Trains small models with each optimizer: sweeps its learning rate with one seed, trains the best "
        "with all seeds, and compares held-out losses and bytes of state. Finished runs are kept in the folder, so the "
        "same command continues where an earlier one was interrupted.",
    )
    add = parser.add_argument
    add("--tasks", type=_names(TASKS), default=list(TASKS), metavar="LIST", help="of gpt,vit,cnn (default: all)")
    add(
        "--optimizers",
        type=_names(CONTENDERS),
        metavar="LIST",
        help=f"of {','.join(CONTENDERS)} (default: all that are here but smmf-0.9 and smmf-0.5; of --scale: "
        f"{','.join(scale.USUAL)})",
    )
    add(
        "--steps",
        type=_steps,
        nargs="+",
        default=[],
        metavar="N",
        help="steps of a run, one or several numbers; TASK=N for one task alone (default: 1800; of --scale: what "
        "fits --minutes)",
    )
    add("--seeds", type=arguments.positive_int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    add("--first-rates", type=arguments.positive_int, default=5, metavar="N", help="a sweep's first rates (default: 5)")
    add(
        "--jobs",
        type=arguments.nonnegative_int,
        default=describe(torch.device("cpu"))["cores"],
        metavar="N",
        help="runs at a time, a process with one thread each; 0: in this process (default: one for each core)",
    )
    add(
        "--minutes",
        type=arguments.nonnegative_float,
        metavar="M",
        help="begin no run after so many minutes; 0 only makes tables and pictures of what there is. With --scale what "
        "all runs together may take (default there: 4)",
    )
    add("--out", type=outputs.folder, required=True, metavar="DIR", help="where the runs and all files go")
    add("--docs", action="store_true", help="put tables and pictures into docs/quality.md as well")
    add("--tiny", action="store_true", help="the smallest models, to try the command: losses say nothing")
    add(
        "--scale",
        action="store_true",
        help="instead of the tasks: a GPT of 126 million parameters, one run per optimizer at its advised rate",
    )
    add("--device", type=arguments.device_name, help="of --scale (default: cuda if there is one, else cpu)")
    return parser


def run(args: argparse.Namespace) -> int:
    """The study of small models on the CPU, or the larger one's."""
    stem = scale.TASK if args.scale else "quality"
    outputs.check_folder("--out", args.out, (f"{stem}.json", f"{stem}.md"))
    usual = scale.USUAL if args.scale else [name for name, contender in CONTENDERS.items() if contender.usual]
    given = args.optimizers or list(usual)
    left_out = {name: f"requires {CONTENDERS[name].missing}" for name in given if CONTENDERS[name].missing}
    for name, why in left_out.items():
        print(f"Left out: {name}, which {why}.")
    seconds = None if args.minutes is None else 60 * args.minutes
    if args.scale:
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        SCALE.settings(1, 0, args.tiny, device=device)  # refuses a device that is not here
        chosen = [name for name in given if usable(name, scale.TASK)]
        steps = next((count for task, count in args.steps if not task), None)
        seconds = 60 * scale.MINUTES if seconds is None else seconds
        plan, seconds = scale.plan(chosen, steps, seconds, args.out, device, args.tiny)
    else:
        plan = Plan(cells(args.tasks, args.steps, given), args.seeds, args.first_rates, args.tiny)
        for task in args.tasks:
            TASKS[task].load(TASKS[task].settings(1, 0, args.tiny))  # before minutes are spent
    if not plan.cells:
        raise UsageError(
            f"--optimizers requires at least one that is installed and meant for the tasks, got {','.join(given)}; "
            f"add {BASE}"
        )
    study = Study(plan, args.out)
    status = 0
    try:
        study.train(0 if args.scale else args.jobs, seconds, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues; runs that were under way begin anew.")
        status = INTERRUPTED
    write(study, left_out, args.out, stem, args.docs)
    for name, why in study.failures.items():
        print(f"FAILED: {name}: {why}", file=sys.stderr)
    if not status and not study.failures and not study.complete:
        print("Not complete: the same command continues.")
    return status or (FAILED if study.failures else 0)


def usable(optimizer: str, task: str) -> bool:
    """Whether an optimizer is here and meant for a task."""
    contender = CONTENDERS[optimizer]
    return not contender.missing and (contender.tasks is None or task in contender.tasks)


def cells(tasks: Sequence[str], steps: Sequence[tuple[str, int]], optimizers: Sequence[str]) -> tuple[Cell, ...]:
    """All cells of a study, task by task, without optimizers that are not usable."""
    found = []
    for task in tasks:
        own = [count for name, count in steps if name == task] or [count for name, count in steps if not name]
        for count in dict.fromkeys(own or [STEPS]):
            found += [Cell(task, count, name) for name in optimizers if usable(name, task)]
    return tuple(found)


def write(study: Study, left_out: dict[str, str], folder: Path, stem: str, docs: bool) -> None:
    """Writes tables and pictures of what is finished, prints the tables, and says where everything is."""
    rows = tables.rows(study)
    setting = describe(torch.device(study.plan.device)) | {"threads": 1}
    text = tables.markdown(study, left_out, setting)
    numbers, page = folder / f"{stem}.json", folder / f"{stem}.md"
    report = {"complete": study.complete, "seeds": study.plan.seeds, "ratio": grid.RATIO, "setting": setting}
    write_json(numbers, report | {"left_out": left_out, "rows": rows})
    page.write_text(text, encoding="utf-8")
    print(f"\n{text}\nTables:  {page}, {numbers}\nRuns:    {study.folder}")
    pictures = _draw(study, rows, folder, stem)
    if docs:
        for path in pictures:
            (PAGE.parent / path.name).write_bytes(path.read_bytes())
        shown = [f"![{_alt(path.stem)}]({path.name})\n" for path in pictures]
        PAGE.write_text(
            tables.into_page(PAGE.read_text(encoding="utf-8"), stem, "\n".join([text, *shown])), encoding="utf-8"
        )
        print(f"Page:    {PAGE}")


def _alt(stem: str) -> str:
    """What a picture shows, for those who cannot see it."""
    *_, kind, task, steps = f"-{stem}".split("-")
    if steps == "frontier":
        return "Held-out loss against bytes of optimizer state per parameter; the tables above have the numbers."
    title = ALL_TASKS[task].title
    return f"Held-out {kind} over {steps} training steps, {title}; the table above has the final losses."


def _draw(study: Study, rows: list[tables.Row], folder: Path, stem: str) -> list[Path]:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        print("Pictures skipped: they require matplotlib; install it with: python -m pip install matplotlib")
        return []
    from bench.quality.pictures import draw

    paths = draw(study, rows, folder, stem)
    for path in paths:
        print(f"Picture: {path}")
    return paths


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"required are names among {', '.join(known)}, got {name!r}")
        if not names:
            raise argparse.ArgumentTypeError(f"required is at least one of {', '.join(known)}, got {text!r}")
        return list(dict.fromkeys(names))

    return parse


def _steps(text: str) -> tuple[str, int]:
    task, _, count = text.rpartition("=")
    if task and task not in TASKS:
        raise argparse.ArgumentTypeError(f"required is N or TASK=N with a task of {', '.join(TASKS)}, got {text!r}")
    return task, arguments.positive_int(count)


if __name__ == "__main__":
    sys.exit(main())
