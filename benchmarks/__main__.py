"""`python -m benchmarks NAME [options]`: run one benchmark, or all of them, and print its table.

The exit status says whether the benchmarks could be run (0) or not (1), never whether a bar was met: that is for a
person to read, on a machine they know.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import signal
import sys
import traceback
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.gpu_timing import NoGpuError
from benchmarks.options import MODELS, NAMES, NEED_GPU, Options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(NAMES)}, or all")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and what each measures")
    parser.add_argument("--model", choices=(*MODELS, "both"), default="both")
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs; not for reporting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiled", action="store_true", help='zoo: 20 models under backend "esper" against eager')
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cache: where the models are")
    parser.add_argument("--json", type=Path, help="file (with all: folder) for the JSON, default benchmarks/out")
    return parser


def _describe(name: str) -> str:
    return (importlib.import_module(f"benchmarks.{name}").__doc__ or "").splitlines()[0]


def _run(name: str, options: Options, path: Path | None, console: Console) -> bool:
    try:
        report = importlib.import_module(f"benchmarks.{name}").run(options)
        written = report.write(path)
    except NoGpuError as error:
        console.print(f"[bold red]benchmark {name} could not be run:[/] {error}", highlight=False)
        return False
    except Exception:
        console.print(f"[bold red]benchmark {name} could not be run:[/]")
        console.print(traceback.format_exc(), markup=False, highlight=False)
        return False
    report.print(console)
    console.print(f"JSON: {_short(written)}", markup=False, highlight=False)
    return True


def _short(path: Path) -> Path:
    """Relative to the current folder where it lies in it."""
    return path.resolve().relative_to(Path.cwd()) if path.resolve().is_relative_to(Path.cwd()) else path


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    chosen = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if chosen.list or chosen.name is None:
        for name in NAMES:
            console.print(f"{name:8}  {_describe(name)}", markup=False, highlight=False)
        return 0
    if chosen.name != "all" and chosen.name not in NAMES:
        nearest = difflib.get_close_matches(chosen.name, (*NAMES, "all"), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        console.print(f"no benchmark is called {chosen.name!r}{hint} There are: {', '.join(NAMES)}, all", markup=False)
        return 1
    if chosen.compiled and chosen.name != "zoo":
        console.print(f"--compiled goes with zoo, not with {chosen.name}", markup=False)
        return 1
    options = Options(
        models=MODELS if chosen.model == "both" else (chosen.model,),
        quick=chosen.quick,
        seed=chosen.seed,
        compiled=chosen.compiled,
        device=chosen.device,
    )
    if chosen.name != "all":
        return 0 if _run(chosen.name, options, chosen.json, console) else 1
    names = [name for name in NAMES if name not in NEED_GPU or torch.cuda.is_available()]
    good = [_run(name, options, chosen.json and chosen.json / f"{name}.json", console) for name in names]
    return 0 if all(good) else 1


if __name__ == "__main__":
    # Ended by a signal, this process still ends its children, which lead process groups of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
