"""The command `kdfast`: doctor, bench, demo, distill. Arguments only; each command's work is in its own package."""

import argparse
import sys
from pathlib import Path

from ._version import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0, 1 for a failure or an unknown name, 2 for bad arguments, 130 when interrupted)."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        return given.command(given)
    except KeyboardInterrupt:
        print("\ninterrupted: finished files stay, nothing is half-written", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"kdfast {given.name}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdfast", description="Fused losses for distillation and contrastive learning.")
    parser.add_argument("--version", action="version", version=f"kdfast {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what works here, what does not and why; exit status 1 if an op is wrong")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")
    doctor.set_defaults(command=_doctor)

    bench = commands.add_parser("bench", help="time the ops against their peers and the machine's limit")
    bench.add_argument("families", nargs="*", metavar="FAMILY", help="what to measure (default: everything there is)")
    bench.add_argument("--case", dest="cases", action="append", default=[], metavar="NAME", help="only this case (may be repeated)")
    level = bench.add_mutually_exclusive_group()
    level.add_argument("--quick", dest="level", action="store_const", const="quick", help="small shapes, a few seconds each")
    level.add_argument("--full", dest="level", action="store_const", const="full", help="all shapes, many rounds")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)")
    bench.add_argument("--seconds", type=_positive, metavar="N", help="with --device cuda: begin nothing later, and end soon")
    bench.add_argument("--compile-only", action="store_true", help="with --device cuda: compile what would be measured, in parallel")
    bench.add_argument(
        "--output", type=Path, default=Path("bench-results"), metavar="DIR", help="where the CSV goes (default: %(default)s)"
    )
    bench.set_defaults(command=_bench, level="default")

    demo = commands.add_parser("demo", help="distil a real sentence encoder into a small student and compare the losses")
    demo.add_argument("--quick", action="store_true", help="digits instead of text: under a minute, nothing to download")
    demo.add_argument("--seeds", type=_positive, default=3, metavar="N", help="students a method (default: %(default)s)")
    demo.add_argument("--epochs", type=_positive, metavar="N", help="epochs a student (default: 15 for text, 40 for digits)")
    demo.add_argument("--output", type=Path, metavar="DIR", help="results and cached embeddings (default: runs/demo, runs/demo-quick)")
    demo.set_defaults(command=_demo)

    distil = commands.add_parser("distill", help="train a small student by each method beside its task, over seeds")
    distil.add_argument(
        "--method", dest="methods", action="append", default=[], metavar="NAME", help="one method (may be repeated; default: all)"
    )
    distil.add_argument(
        "--data",
        choices=("digits", "mnist1d", "text"),
        default="digits",
        help="what to learn, offline (default: %(default)s)",
    )
    distil.add_argument(
        "--tune", action="store_true", help="compare a tenth, the whole and ten times each method's weight, on samples kept for validation"
    )
    distil.add_argument("--seeds", type=_positive, default=3, metavar="N", help="students a method (default: %(default)s)")
    distil.add_argument("--steps", type=_positive, default=400, metavar="N", help="batches a student (default: %(default)s)")
    distil.add_argument("--output", type=Path, default=Path("runs/distill"), metavar="DIR", help="results (default: %(default)s)")
    distil.set_defaults(command=_distill)
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return value


def _doctor(given: argparse.Namespace) -> int:
    from . import doctor

    return doctor.main(as_json=given.json)


def _bench(given: argparse.Namespace) -> int:
    from . import bench

    if given.device == "cpu":
        bench.run(given.families, given.level, given.output, given.cases)
    elif given.compile_only:
        bench.compile_for_gpu(given.families, given.level, given.cases, seconds=given.seconds)
    else:
        bench.run_on_gpu(given.families, given.level, given.output, given.cases, seconds=given.seconds)
    return 0


def _demo(given: argparse.Namespace) -> int:
    from . import demo

    demo.run(
        given.output or Path("runs/demo-quick" if given.quick else "runs/demo"), quick=given.quick, seeds=given.seeds, epochs=given.epochs
    )
    return 0


def _distill(given: argparse.Namespace) -> int:
    from . import study

    command = study.tune if given.tune else study.run
    command(given.methods, given.output, data=given.data, seeds=given.seeds, steps=given.steps)
    return 0
