"""The console script `minimoe`: compare, list.

Exit status: 0 done, 1 a run that failed (a loss that is no number), 2 bad input, 130 interrupted.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import __version__, streams
from .compare import LEARNERS, TOY, compare, table
from .files import write_atomic

OUT = "minimoe-compare"


class Parser(argparse.ArgumentParser):
    """Bad input gets one line, not a page of usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> Parser:
    top = Parser(prog="minimoe", description="Mixtures of low-rank experts, side by side.")
    top.add_argument("--version", action="version", version=f"minimoe {__version__}")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)
    add = commands.add_parser(
        "compare", help="carry schemes through a stream of tasks"
    ).add_argument
    add("--stream", default="permuted-digits", help="default %(default)s; see minimoe list")
    add("--schemes", nargs="+", metavar="NAME", help="default all; see minimoe list")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default 0")
    add("--tasks", type=int, default=5, metavar="N", help="default %(default)s")
    add("--epochs", type=int, metavar="N", help=f"per task, default {TOY['epochs']}")
    add("--rank", type=int, metavar="N", help=f"ranks per task, default {TOY['rank']}")
    kept = ", ".join(f"{k} for {name}" for name, k in TOY["top_k"].items())
    add("--top-k", type=int, metavar="N", help=f"experts kept per token, default {kept}")
    add("--tau", type=float, help=f"mora's temperature, default {TOY['tau']}")
    add("--delta", type=float, help=f"mora's threshold at test, default {TOY['delta']}")
    add("--device", default="cpu", help="default cpu; cuda, cuda:1, ...")
    add("--out", type=Path, help=f"output folder, default {OUT}, or {OUT}-2, ... if that is taken")
    add("--resume", action="store_true", help="go on with the run in the output folder")
    commands.add_parser("list", help="what schemes, baselines and streams there are")
    return top


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        return run_list() if args.command == "list" else run_compare(args)
    except FloatingPointError as error:
        return fail(str(error), 1)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        return fail(str(error), 2)
    except KeyboardInterrupt:
        return fail("interrupted; --resume goes on from the last finished task", 130)


def fail(message: str, status: int) -> int:
    print(f"minimoe: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def run_list() -> int:
    print("schemes and baselines (--schemes)")
    for name, (what, _) in LEARNERS.items():
        print(f"  {name:16}{what}")
    print("streams (--stream)")
    for name in streams.STREAMS:
        print(f"  {name:16}{streams.shows(name)}")
    return 0


def run_compare(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    # These matrices are too small to share between threads: one thread is faster, and gives
    # the same bits whatever the number of cores.
    torch.set_num_threads(1)
    device_is_here(args.device)
    out = output_folder(args.out, args.resume)
    settings: dict[str, Any] = dict(TOY)
    for name in ("epochs", "rank", "tau", "delta"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    if args.top_k is not None:
        settings["top_k"] = dict.fromkeys(TOY["top_k"], args.top_k)
    schemes, seeds = list(dict.fromkeys(args.schemes or LEARNERS)), list(dict.fromkeys(args.seeds))
    if min(seeds) < 0:
        raise ValueError(f"seeds is {min(seeds)}, allowed: 0 or more")
    bar: Any = None  # opened with the first task, when all that was asked for has been checked

    def done(label: str, tasks: int) -> None:
        nonlocal bar
        if bar is None:
            print(f"writing to {out}", flush=True)
            bar = tqdm(total=len(schemes) * len(seeds) * args.tasks, unit="task", leave=False)
        bar.set_description(label)
        bar.update(tasks)

    try:
        result = compare(out, args.stream, schemes, seeds, args.tasks, args.device, settings, done)
    finally:
        if bar is not None:
            bar.close()
    from .plots import plot_compare

    write_atomic(out / "compare.json", (json.dumps(result, indent=1) + "\n").encode())
    plot_compare(result, out / "compare.png")
    print(table(result))
    print(f"\n{out / 'compare.json'}\n{out / 'compare.png'}")
    return 0


def device_is_here(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = "cpu" + (", cuda" if torch.cuda.is_available() else "")
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {name!r}, allowed here: {here} ({reason})") from None


def output_folder(given: Path | None, resume: bool) -> Path:
    """The folder to write to, not made yet. Only --resume may write to one that holds a run."""
    names = (Path(OUT if n == 1 else f"{OUT}-{n}") for n in itertools.count(1))
    if given is None and not resume:
        return next(name for name in names if not name.exists())
    if given is None:
        taken = list(itertools.takewhile(Path.exists, names))
        return taken[-1] if taken else Path(OUT)
    if not resume and any((given / name).exists() for name in ("checkpoints", "compare.json")):
        raise ValueError(f"{given} holds a run already: --resume goes on, another --out keeps both")
    return given
