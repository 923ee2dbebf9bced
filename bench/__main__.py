"""The command line of the benchmark: ``python -m bench``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import record, session, shapes
from bench.contestants import OPS
from bench.machine import ROOT, describe
from hfac import backends
from hfac.cli import outputs

DTYPES = ("float32", "bfloat16", "float16", "float64")
WHAT = ("hfac", "smmf", *OPS, "step")
#: rounds, and seconds per contestant and case
FULL, QUICK = (24, 1.5), (6, 0.3)
RED = 1  # the exit status after a red gate


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status: 0, or 1 where a parity gate was red."""
    parser = build_parser()
    args = parser.parse_args(argv)
    device = _device(parser, args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rounds, seconds = QUICK if args.quick else FULL
    ops, optimizers = session.covered(args.ops, OPS)
    plan = session.Plan(
        ops=ops,
        optimizers=optimizers,
        shapes=tuple(args.shapes or (shapes.QUICK if args.quick else shapes.FULL)),
        dtypes=tuple(args.dtypes),
        backends=_backends(parser, args.backends, device),
        device=device,
        rounds=args.rounds or rounds,
        seconds=seconds,
        quick=args.quick,
    )
    folder = args.out or (ROOT / "bench-out" if args.quick else ROOT / "bench" / "results")
    path = _result_path(parser, folder, describe(device)["machine"])
    if args.plot:
        _need_matplotlib(parser)

    run = session.Session(plan)
    run.run()
    if run.rows:
        record.write(path, run.rows)
        print(f"Numbers: {path}\nTables:  {path.with_suffix('.md')}")
        if args.plot:
            from bench.plot import draw

            for picture in draw(run.rows, path.with_suffix("")):
                print(f"Picture: {picture}")
    for failure in run.failures:
        print(failure, file=sys.stderr)
    return RED if run.failures else 0


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times the kernels and the whole steps of hfac's optimizers beside their rivals, in one run, and "
        "counts bytes and memory. What has not agreed with the reference in the same run gets no numbers.",
    )
    add = parser.add_argument
    add(
        "--ops",
        nargs="+",
        choices=WHAT,
        default=["hfac", "smmf"],
        metavar="OP",
        help=f"any of {', '.join(WHAT)} (default: hfac smmf)",
    )
    named = "; ".join(f"{name}: {what}" for name, (what, _) in shapes.NAMED.items())
    add(
        "--shapes",
        nargs="+",
        type=_shapes,
        metavar="LIST",
        help=f"parameter lists such as 4096x4096, '16x 1024x1024', '400x 768 + 100x 64x64', or one of these: {named} "
        f"(default: {', '.join(map(repr, shapes.FULL))})",
    )
    add(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=["float32", "bfloat16"],
        metavar="TYPE",
        help=f"any of {', '.join(DTYPES)} (default: float32 bfloat16)",
    )
    names = ", ".join(backends.TABLE)
    add(
        "--backends",
        nargs="+",
        choices=tuple(backends.TABLE),
        metavar="NAME",
        help=f"any of {names} (default: all here)",
    )
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add("--threads", type=_positive, metavar="N", help="threads on the CPU (default: torch's own number)")
    add("--rounds", type=_positive, metavar="N", help=f"rounds (default: {FULL[0]}, with --quick {QUICK[0]})")
    add("--quick", action="store_true", help="few rounds of small lists, under a minute; written to bench-out/")
    add("--plot", action="store_true", help="draw a roofline picture and a bar chart beside the numbers")
    add("--out", type=outputs.folder, metavar="DIR", help="where the files go (default: bench/results)")
    return parser


def _shapes(text: str) -> str:
    try:
        shapes.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return shapes.ALIASES.get(text, text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"required is a whole number of at least 1, got {text!r}")
    return int(text)


def _device(parser: argparse.ArgumentParser, text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: required is cpu, cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        parser.error(
            f"--device: required is a device that torch sees, got {text!r}; torch {torch.__version__} sees {count} "
            "CUDA devices. Use --device cpu, or install a torch with CUDA and check that nvidia-smi lists the GPU"
        )
    return device


def _backends(parser: argparse.ArgumentParser, names: list[str] | None, device: torch.device) -> tuple[str, ...]:
    for name in names or ():
        try:
            backends.resolve(name, device)
        except RuntimeError as error:
            parser.error(f"--backends: required are backends that are here, got {name!r}: {error}")
    return tuple(dict.fromkeys(names or backends.available(device)))


def _result_path(parser: argparse.ArgumentParser, folder: Path, machine: str) -> Path:
    """Makes the folder and looks at what is there before minutes are spent."""
    path = record.result_path(folder, machine)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record.read(path)
    except OSError as error:
        parser.error(f"--out: required is a folder that can be written, got {folder} ({error.strerror}); give another")
    except ValueError as error:
        parser.error(f"--out: {error}")
    return path


def _need_matplotlib(parser: argparse.ArgumentParser) -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        parser.error("--plot: required is matplotlib, which is not installed; run: python -m pip install matplotlib")


if __name__ == "__main__":
    sys.exit(main())
