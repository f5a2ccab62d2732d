"""The console script `minimoe`: compare, study, check, new-scheme, bench, list.

Exit status: 0 done, 1 a run that failed (a loss that is no number) or a law that is broken, 2 bad
input, 130 interrupted.
"""

import argparse
import itertools
import json
import keyword
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import __version__, bench, studies
from .compare import choose, compare
from .continual import streams
from .roster import EPOCHS, ROSTER, SCHEMES, lookup
from .studies import STUDIES
from .tools import parallel
from .tools.files import write_atomic
from .tools.results import to_json
from .tools.tables import compare_page, study_table, table

OUT = {"compare": "minimoe-compare", "study": "minimoe-study", "bench": "minimoe-bench"}
OUT_HELP = "output folder, default {0}, or {0}-2, ... if that is taken"
DTYPES = ("float32", "float16", "bfloat16", "float64")


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
    add(
        "--schemes",
        nargs="+",
        metavar="NAME",
        help="see minimoe list, or file.py:Class; default the three and the baselines; all for the "
        "atlas too",
    )
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default 0")
    add("--tasks", type=int, default=5, metavar="N", help="default %(default)s")
    add("--epochs", type=int, default=EPOCHS, metavar="N", help="per task, default %(default)s")
    usual = ROSTER["mora"].settings
    add("--rank", type=int, metavar="N", help=f"ranks per task, default {usual['rank']}")
    settings = {name: entry.settings for name, entry in ROSTER.items()}
    kept = ", ".join(f"{own['top_k']} for {n}" for n, own in settings.items() if "top_k" in own)
    add("--top-k", type=int, metavar="N", help=f"experts kept per token, default {kept}")
    add("--tau", type=float, help=f"mora's temperature, default {usual['tau']}")
    add("--delta", type=float, help=f"mora's threshold at test, default {usual['delta']}")
    add("--device", default="cpu", help="default cpu; cuda, cuda:1, ...")
    add("--out", type=Path, help=OUT_HELP.format(OUT["compare"]))
    add("--resume", action="store_true", help="go on with the run in the output folder")
    add = commands.add_parser(
        "study", help="measure what the paper claims; goes on where it was stopped"
    ).add_argument
    add("name", metavar="NAME", help=f"{', '.join(STUDIES)}, or all")
    add("--seeds", nargs="+", type=int, metavar="N", help="default 0 to 4, quick 0 and 1")
    add("--quick", action="store_true", help="fewer tasks, less training")
    add("--jobs", type=int, metavar="N", help="runs side by side, default one per core")
    add("--out", type=Path, default=Path(OUT["study"]), help="default %(default)s")
    add = commands.add_parser("check", help="hold schemes to the laws").add_argument
    add("schemes", nargs="+", metavar="NAME", help=f"{', '.join(SCHEMES)}, or file.py:Class")
    add("--json", action="store_true", help="print JSON instead of the table")
    add = commands.add_parser("new-scheme", help="write a scheme to fill in").add_argument
    add("name", metavar="NAME", help="as in my_gate, for my_gate.py with a class MyGate")
    add = commands.add_parser("bench", help="time the sparse path beside the rest").add_argument
    add("--device", default="cpu", help="default cpu; cuda, cuda:1, ...")
    add("--dtype", choices=DTYPES, help="default float32, on a GPU bfloat16")
    add("--tokens", type=int, default=4096, metavar="T", help="default %(default)s")
    add("--width", type=int, default=768, metavar="D", help="of input and output, default 768")
    add("--top-k", type=int, default=16, metavar="K", help="ranks kept, default %(default)s")
    add("--ranks", nargs="+", type=int, default=[64, 256, 1024, 4096], metavar="R", help="in all")
    add(
        "--routing",
        nargs="+",
        default=list(bench.ROUTINGS),
        metavar="NAME",
        help=", ".join(bench.ROUTINGS),
    )
    add("--repeats", type=int, default=9, metavar="N", help="rounds, default %(default)s")
    add("--threads", type=int, metavar="N", help="on the CPU; default torch's choice")
    add("--out", type=Path, help=OUT_HELP.format(OUT["bench"]))
    commands.add_parser("list", help="what schemes, baselines and streams there are")
    return top


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    args.typed = f"minimoe {shlex.join(arguments)}"
    commands = {
        "compare": run_compare,
        "study": run_study,
        "check": run_check,
        "new-scheme": run_new_scheme,
        "bench": run_bench,
        "list": run_list,
    }
    try:
        return commands[args.command](args)
    except FloatingPointError as error:
        return fail(str(error), 1)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        return fail(str(error), 2)
    except KeyboardInterrupt:
        go_on = {
            "compare": "; --resume goes on from the last finished task",
            "study": "; the same command goes on from the finished cells",
        }.get(args.command, "")
        return fail(f"interrupted{go_on}", 130)
    finally:
        parallel.stop()


def fail(message: str, status: int) -> int:
    if parallel.process() == 0:
        print(f"minimoe: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def run_list(args: argparse.Namespace) -> int:
    print("schemes and baselines (--schemes)")
    for name, entry in ROSTER.items():
        print(f"  {name:16}{entry.kind}: {entry.summary}")
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
    parallel.start(args.device)
    first = parallel.process() == 0
    out = parallel.agreed(output_folder("compare", args.out, args.resume) if first else None)
    asked = {name: getattr(args, name) for name in ("rank", "top_k", "tau", "delta")}
    changes = {name: value for name, value in asked.items() if value is not None}
    seeds = list(dict.fromkeys(args.seeds))
    if min(seeds) < 0:
        raise ValueError(f"seeds is {min(seeds)}, allowed: 0 or more")
    schemes = choose(args.schemes, streams.make(args.stream, args.tasks, seeds[0]))
    bar: Any = None  # opened with the first task, when all that was asked for has been checked

    def done(label: str, tasks: int) -> None:
        nonlocal bar
        if bar is None and first:
            print(f"writing to {out}", flush=True)
        if bar is None:
            bar = tqdm(
                disable=not first,
                total=len(schemes) * len(seeds) * args.tasks,
                unit="task",
                leave=False,
            )
        bar.set_description(label)
        bar.update(tasks)

    try:
        result = compare(
            out, args.stream, schemes, seeds, args.tasks, args.device, args.epochs, changes, done
        )
    finally:
        if bar is not None:
            bar.close()
    if not first:
        return 0
    from .tools.plots import plot_compare, plot_gates

    pictures = ["compare.png"]
    write_json(out / "compare.json", result)
    plot_compare(
        result,
        out / "compare.png",
        thick=[name for name, entry in schemes.items() if entry.kind == "scheme"],
        dashed=[name for name, entry in schemes.items() if entry.kind in ("baseline", "bound")],
    )
    if any(scheme.intrusion.mean is not None for scheme in result.schemes.values()):
        plot_gates(result, out / "gates.png")
        pictures.append("gates.png")
    write_atomic(out / "compare.md", compare_page(result, args.typed, pictures).encode())
    print(table(result))
    print("", *(out / name for name in ("compare.json", "compare.md", *pictures)), sep="\n")
    return 0


def write_json(path: Path, result: Any) -> None:
    write_atomic(path, (json.dumps(to_json(result), indent=1) + "\n").encode())


def run_study(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    if args.name not in (*STUDIES, "all"):
        raise ValueError(f"study is {args.name!r}, allowed: {', '.join(STUDIES)}, all")
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"jobs is {args.jobs}, allowed: 1 or more")
    seeds = list(dict.fromkeys(args.seeds or ((0, 1) if args.quick else range(5))))
    if min(seeds) < 0:
        raise ValueError(f"seeds is {min(seeds)}, allowed: 0 or more")
    args.out.mkdir(parents=True, exist_ok=True)  # bad input, before the bar
    for name in STUDIES if args.name == "all" else [args.name]:
        print(f"writing to {args.out}", flush=True)
        bar = tqdm(unit="cell", leave=False)

        def done(label: str, cells: int, total: int, bar: Any = bar) -> None:
            bar.total = total
            bar.set_description(label)
            bar.update(cells)

        with bar:
            result = studies.run_study(name, args.out, seeds, args.quick, args.jobs or -1, done)
        print(study_table(result))
        files = [args.out / f"{name}.json", args.out / f"{name}.png", args.out / "findings.md"]
        print("", *files, sep="\n")
    return 0


def run_check(args: argparse.Namespace) -> int:
    from hypothesis.configuration import set_hypothesis_home_dir
    from tqdm import tqdm

    from . import laws

    torch.set_num_threads(1)
    schemes = {}
    for name in dict.fromkeys(args.schemes):
        if name not in SCHEMES and ":" not in name:
            raise ValueError(f"scheme is {name!r}, allowed: {', '.join(SCHEMES)}, file.py:Class")
        scheme = lookup(name)[1].scheme
        assert scheme is not None
        laws.claimed(scheme, {})  # bad input, before the bar
        schemes[name] = scheme
    results: dict[str, list[laws.Row]] = {name: [] for name in schemes}
    bar = tqdm(total=len(schemes) * len(laws.LAWS), unit="law", leave=False)
    with bar, tempfile.TemporaryDirectory() as notes:
        set_hypothesis_home_dir(notes)  # and not .hypothesis in the folder one stands in
        for name, scheme in schemes.items():
            for law in laws.LAWS:
                bar.set_description(f"{name}, {law.__name__}")
                results[name].append(laws.hold(law, scheme))
                bar.update()
    if args.json:
        keys = ("law", "verdict", "evidence")
        rows = {
            n: [{key: getattr(row, key) for key in keys} for row in results[n]] for n in results
        }
        print(json.dumps(rows, indent=1))
    else:
        print(laws.table(results))
    return int(any(row.verdict == "broken" for rows in results.values() for row in rows))


def run_new_scheme(args: argparse.Namespace) -> int:
    name = args.name
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise ValueError(f"name is {name!r}, allowed: a module's name, as in my_gate")
    path = Path(f"{name}.py")
    if path.exists():
        raise ValueError(f"{path} is there already")
    title = "".join(part.capitalize() for part in name.split("_"))
    template = Path(__file__).parent / "laws" / "template.py"
    text = template.read_text(encoding="utf-8")
    text = text.replace("NewScheme", title).replace("new_scheme", name)
    write_atomic(path, text.encode())
    print(f"{path}\n\nminimoe check {path}:{title}")
    return 0


def run_bench(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .tools.plots import plot_bench

    device_is_here(args.device)
    on_cpu = torch.device(args.device).type == "cpu"
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"threads is {args.threads}, allowed: 1 or more")
        torch.set_num_threads(args.threads)
    out = output_folder("bench", args.out)
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)  # now, not after minutes of timing
    bar: Any = None  # opened when the first group is done, so that bad input gets its one line

    def done(label: str, total: int) -> None:
        nonlocal bar
        if bar is None:
            print(f"writing to {out}", flush=True)
            bar = tqdm(total=total, unit="group", leave=False)
        bar.set_description(label)
        bar.update()

    try:
        result = bench.bench(
            device=args.device,
            dtype=getattr(torch, dtype),
            tokens=args.tokens,
            width=args.width,
            top_k=args.top_k,
            ranks=tuple(dict.fromkeys(args.ranks)),
            routings=tuple(dict.fromkeys(args.routing)),
            repeats=args.repeats,
            done=done,
        )
    except BaseException:
        if made:
            out.rmdir()
        raise
    finally:
        if bar is not None:
            bar.close()
    write_json(out / "bench.json", result)
    plot_bench(result, out / "bench.png")
    write_atomic(out / "bench.md", bench.page(result, args.typed, "bench.png").encode())
    print(bench.table(result))
    print("", *(out / name for name in ("bench.json", "bench.md", "bench.png")), sep="\n")
    return 0


def device_is_here(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = "cpu" + (", cuda" if torch.cuda.is_available() else "")
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {name!r}, allowed here: {here} ({reason})") from None


def output_folder(command: str, given: Path | None, resume: bool = False) -> Path:
    """The folder to write to, not made yet. Only --resume may write to one that holds a run."""
    usual = OUT[command]
    names = (Path(usual if n == 1 else f"{usual}-{n}") for n in itertools.count(1))
    if given is None and not resume:
        return next(name for name in names if not name.exists())
    if given is None:
        taken = list(itertools.takewhile(Path.exists, names))
        return taken[-1] if taken else Path(usual)
    if not resume and any((given / name).exists() for name in ("checkpoints", f"{command}.json")):
        go_on = "--resume goes on, " if command == "compare" else ""
        raise ValueError(f"{given} holds a run already: {go_on}another --out keeps both")
    return given
