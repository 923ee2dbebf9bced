"""Steps of this checkout beside those of another one: ``python -m bench.against CHECKOUT``.

Two processes, one for each checkout, step in turns, A B B A, each when it is asked: a slow moment of the machine hits
both. They differ in nothing but the checkout, whose extension must have been built; of it they use the optimizers
alone, so that the other checkout may be of any version. A row counts when, in both processes, the backend's parameters
agree with the reference's after three steps.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import shapes, timing
from bench.machine import ROOT, commit, describe
from bench.report import Row, plain_table

#: optimizer and what its step does besides -> options
STEPS: dict[tuple[str, str], dict[str, float]] = {
    ("HFac", "plain"): {},
    ("SMMF", "plain"): {},
    ("HFac", "max_grad_norm, not reached"): {"max_grad_norm": 1e30},
    ("SMMF", "max_grad_norm, not reached"): {"max_grad_norm": 1e30},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 0, or 1 where a gate was red."""
    parser = argparse.ArgumentParser(prog="python -m bench.against", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkout", type=Path, help="the other checkout's folder, with its extension built in place")
    add("--shapes", nargs="+", default=shapes.FULL, metavar="LIST", help="as `python -m bench` takes them")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], metavar="TYPE")
    add("--device", default="cpu")
    add("--backend", default="cpu")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=20)
    add("--out", type=Path, help="a JSON file to write, raw times included, with a table in Markdown beside it")
    args = parser.parse_args(argv)
    if not (args.checkout / "hfac" / "__init__.py").is_file():
        parser.error(f"required is the folder of a checkout of hfac, got {args.checkout}")

    folders = args.checkout.resolve(), ROOT
    before, now = (_commit(folder) for folder in folders)
    processes = [_start(folder, args.threads) for folder in folders]
    rows: list[Row] = []
    red = False
    try:
        for name, dtype, (optimizer, kind) in itertools.product(args.shapes, args.dtypes, STEPS):
            row = {"list": name, "dtype": dtype, "optimizer": optimizer, "step": kind}
            task = row | {"options": STEPS[optimizer, kind], "shapes": shapes.parse(name)}
            task |= {"device": args.device, "backend": args.backend}
            reasons = [str(reason) for process in processes if (reason := _ask(process, task)) is not None]
            if reasons:
                red = True
                print("PARITY GATE RED: " + "; ".join([*row.values(), *reasons]), file=sys.stderr)
                continue
            found = _measure(processes, args.rounds)
            rows.append(row | found)
            said = "before {before:.3f} ms, now {now:.3f} ms, ratio {ratio:.3f} [{q20:.2f}-{q80:.2f}]".format(**found)
            print("; ".join([*row.values(), said]), flush=True)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    if not rows:
        return 1
    mean = math.exp(statistics.fmean(math.log(row["ratio"]) for row in rows))
    title = (
        f"Steps of {now} beside those of {before}, milliseconds. The ratio is the time before over the time now: of "
        "the medians, and the quantiles of 20 and 80 % of the rounds' ratios. Its geometric mean over the rows: "
        f"{mean:.3f}"
    )
    print(title)
    if args.out is not None:
        setting = describe(torch.device(args.device)) | {"threads": args.threads}
        record = {"what": title, "setting": setting, "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        text = f"{title}\n\n{setting['machine']}, {args.threads} threads, torch {torch.__version__}.\n\n"
        args.out.with_suffix(".md").write_text(text + plain_table(rows) + "\n", encoding="utf-8")
    return int(red)


def _commit(folder: Path) -> str:
    found = commit(folder)
    return f"{(found['commit'] or 'a folder without git')[:10]}{' + changes' if found['dirty'] else ''}"


def _start(folder: Path, threads: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).with_name("against_child.py")), str(folder), str(threads)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(process: subprocess.Popen[str], question: Any) -> Any:
    """The answer to a task (why its gate is red, or None) or to a number (seconds of a step, the mean of as many)."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"the process of {process.args[2]} ended; what it said stands above")
    return json.loads(answer)


def _measure(processes: Sequence[subprocess.Popen[str]], rounds: int) -> Row:
    """Times of both in turns, A B B A."""
    repeats = max(1, round(timing.SAMPLE_SECONDS / max(_ask(process, 3) for process in processes)))
    samples: list[dict[int, float]] = [{}, {}]
    for turn in range(rounds):
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            samples[i][turn] = _ask(processes[i], repeats)
    before, now = samples
    ratio = timing.speedup(now, before)
    return {
        "before": 1e3 * timing.quantiles(before).median,
        "now": 1e3 * timing.quantiles(now).median,
        "ratio": ratio.median,
        "q20": ratio.q20,
        "q80": ratio.q80,
        "samples_before": [1e3 * seconds for seconds in before.values()],
        "samples_now": [1e3 * seconds for seconds in now.values()],
    }


if __name__ == "__main__":
    sys.exit(main())
