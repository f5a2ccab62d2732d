"""The console script `minimoe`: compare, study, check, new-scheme, bench, list, plot, table.

Exit status: 0 done, 1 a run that failed (a loss that is no number) or a law that is broken, 2 bad
input, 130 interrupted, 143 terminated, 141 nobody reads the output. Results go to stdout, all else
to stderr.
"""

import argparse
import contextlib
import dataclasses
import itertools
import keyword
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import joblib
import torch

from . import __version__, bench, laws, studies
from .compare import choose, compare, report, usual_schemes
from .compare import draw as draw_compare
from .continual import streams
from .continual.backbones import BACKBONES
from .continual.learn import OPTIMISERS
from .laws.apart import SECONDS, check_apart, same_apart
from .laws.pair import WITHIN
from .options import FIXED, RUN, Options, canonical
from .roster import EPOCHS, ROSTER, SCHEMES
from .setting import Setting, stream_of
from .sparse import threshold
from .studies import STUDIES
from .tools import console, parallel
from .tools.device import device_is_here
from .tools.files import read_json, sealed, write_atomic, write_json
from .tools.results import MEND, CompareResult, StudyResult, to_json
from .tools.tables import FORMATS, formatted, study_table, table

OUT = {"compare": "minimoe-compare", "study": "minimoe-study", "bench": "minimoe-bench"}
OUT_HELP = "output folder, default {0}, or {0}-2, ... if that is taken"
DTYPES = ("float32", "float16", "bfloat16", "float64")
STOPPED = {  # what goes on, if a command was stopped
    "compare": "; --resume goes on from the last finished task",
    "study": "; the same command goes on from the finished cells",
}


class Parser(argparse.ArgumentParser):
    """Bad input gets one line, not a page of usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> Parser:
    top = Parser(prog="minimoe", description="Mixtures of low-rank experts, side by side.")
    top.add_argument("--version", action="version", version=f"minimoe {__version__}")
    commands = top.add_subparsers(dest="command", parser_class=Parser)
    usual = Options()
    add = commands.add_parser(
        "compare", help="carry schemes through a stream of tasks"
    ).add_argument
    add("--stream", help=f"default {usual.stream}; see minimoe list, or file.py:make")
    add(
        "--backbone",
        metavar="NAME",
        help=f"{', '.join(BACKBONES)}, or file.py:make; default the stream's own",
    )
    add(
        "--targets", metavar="PATTERN", help="names of the layers to adapt, default the model's own"
    )
    add(
        "--schemes",
        nargs="+",
        metavar="NAME",
        help="see minimoe list, or file.py:Class; default the three and the baselines; all for the "
        "atlas too",
    )
    add("--seeds", nargs="+", type=int, metavar="N", help="default 0")
    other = streams.usual_tasks(None)
    add("--tasks", type=int, metavar="N", help=f"default {other}, for {usual.stream} {usual.tasks}")
    add("--epochs", type=int, metavar="N", help=f"per task, default {EPOCHS}")
    add("--lr", type=float, help="learning rate, default each learner's own")
    add("--batch", type=int, metavar="N", help=f"examples in a batch, default {usual.batch}")
    add("--optimiser", metavar="NAME", help=f"{', '.join(OPTIMISERS)}; default {usual.optimiser}")
    rank = ROSTER["mora"].settings["rank"]
    add("--rank", type=int, metavar="N", help=f"ranks per task, default {rank}")
    add(
        "--top-k",
        type=int,
        metavar="N",
        help="experts kept per token; default, as of the next two, what was tuned on the stream",
    )
    add("--tau", type=float, help="mora's temperature")
    add("--delta", type=float, help="mora's threshold at test")
    add("--device", help="default cpu; cuda, cuda:1, ...")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs side by side, default 1; -1: all cores",
    )
    add("--out", type=Path, help=OUT_HELP.format(OUT["compare"]))
    add(
        "--resume",
        action="store_true",
        help="go on with the run in the output folder (default: the latest), with its options; "
        "those given may add schemes, seeds and tasks",
    )
    add = commands.add_parser(
        "study", help="measure what the paper claims; goes on where it was stopped"
    ).add_argument
    add("name", metavar="NAME", help=f"{', '.join(STUDIES)}, or all")
    add("--seeds", nargs="+", type=int, metavar="N", help="default the study's own, quick 0 and 1")
    add("--quick", action="store_true", help="fewer tasks, less training")
    add("--jobs", type=int, metavar="N", help="runs side by side, default one per core")
    add("--out", type=Path, default=Path(OUT["study"]), help="default %(default)s")
    add = commands.add_parser("check", help="hold schemes to the laws").add_argument
    add("schemes", nargs="+", metavar="NAME", help=f"{', '.join(SCHEMES)}, or file.py:Class")
    add(
        "--as",
        dest="theirs",
        metavar="NAME",
        help="hold each to this scheme, step by step, and not to the laws; file.py:NAME may then "
        "be a function of x and a layer, or a minimoe.laws.Mapped",
    )
    add("--device", help="of --as: default cpu; cuda, cuda:1, ...")
    add(
        "--within",
        type=float,
        metavar="SHARE",
        help="of --as: how far numbers may be apart, as a share of the largest; default "
        f"{WITHIN:g}; 1e-4 for what computes in float32, as many kernels do",
    )
    add("--jobs", type=int, metavar="N", help="laws side by side, default one per core")
    add(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="N",
        help="for a law, or a step of --as; one that takes longer is broken; default %(default)g",
    )
    add("--json", action="store_true", help="print JSON instead of the table")
    add = commands.add_parser("new-scheme", help="write a scheme to fill in").add_argument
    add("name", metavar="NAME", help="as in my_gate, for my_gate.py with a class MyGate")
    add = commands.add_parser("bench", help="time the sparse path beside the rest").add_argument
    add("--device", default="cpu", help="default cpu; cuda, cuda:1, ...")
    add("--dtype", choices=DTYPES, help="default float32, on a GPU bfloat16")
    add("--tokens", type=int, default=4096, metavar="T", help="default %(default)s")
    add(
        "--width",
        nargs="+",
        type=int,
        metavar="D",
        help="of input and output, default 768; on a GPU 1024 and 4096",
    )
    add("--top-k", type=int, default=16, metavar="K", help="ranks kept, default %(default)s")
    add(
        "--ranks",
        nargs="+",
        type=int,
        metavar="R",
        help="in all, default 64 256 512 1024 4096; on a GPU also 8192 16384",
    )
    add("--routing", nargs="+", metavar="NAME", help=f"{', '.join(bench.ROUTINGS)}: default all")
    add("--repeats", type=int, default=9, metavar="N", help="rounds, default %(default)s")
    add("--threads", type=int, metavar="N", help="on the CPU; default torch's choice")
    add("--out", type=Path, help=OUT_HELP.format(OUT["bench"]))
    commands.add_parser("list", help="what schemes, baselines and streams there are")
    add = commands.add_parser("plot", help="draw stored results again").add_argument
    add("file", type=Path, metavar="FILE", help="compare.json, bench.json, or a study's")
    add("--out", type=Path, help="folder for the pictures, default the file's")
    add = commands.add_parser("table", help="print stored results").add_argument
    add("file", type=Path, metavar="FILE", help="compare.json, bench.json, or a study's")
    add("--format", choices=FORMATS, default="text", help="default %(default)s")
    return top


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    console.degrade()
    with console.stoppable():
        try:
            status = run(arguments)
            flush()
            return status
        except FloatingPointError as error:
            return fail(str(error), 1)
        except BrokenPipeError:
            return 141
        except (ValueError, ModuleNotFoundError, OSError) as error:
            return fail(str(error), 2)
        except KeyboardInterrupt as stop:
            console.ignore_stops()
            go_on = STOPPED.get(next(iter(arguments), ""), "")
            if isinstance(stop, console.Stopped):
                return fail(f"terminated{go_on}", 143)
            return fail(f"interrupted{go_on}", 130)
        finally:
            parallel.stop()
            with contextlib.suppress(OSError):
                flush()


def run(arguments: list[str]) -> int:
    if not arguments:
        print(parser().format_help(), end="")
        return 0
    try:
        args = parser().parse_args(arguments)
    except SystemExit:
        flush()  # of help, while somebody still looks at what goes wrong
        raise
    args.typed = f"minimoe {shlex.join(arguments)}"
    commands = {
        "compare": run_compare,
        "study": run_study,
        "check": run_check,
        "new-scheme": run_new_scheme,
        "bench": run_bench,
        "list": run_list,
        "plot": run_plot,
        "table": run_table,
    }
    return commands[args.command](args)


def flush() -> None:
    """Raise here, and not when Python ends, if what was printed cannot be written."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:
            console.discard_output()
            raise


def fail(message: str, status: int) -> int:
    if parallel.process() == 0:
        console.say(f"minimoe: error: {' '.join(message.split())}")
    return status


def run_list(args: argparse.Namespace) -> int:
    schemes = {}
    for name, entry in ROSTER.items():
        needs = f" (of a model with {' and '.join(entry.needs)})" if entry.needs else ""
        schemes[name] = f"{entry.kind}: {entry.summary}{needs}"
    shows = {name: streams.shows(name) for name in streams.STREAMS}
    models = {name: " ".join((make.__doc__ or "").split()) for name, make in BACKBONES.items()}
    for head, words in (
        ("schemes and baselines (--schemes)", schemes),
        ("streams (--stream)", shows),
        ("models (--backbone)", models),
    ):
        print(head)
        for name, text in words.items():
            line = f"  {name:20}{text}"
            width = console.width() or len(line)
            print(textwrap.fill(line, width, subsequent_indent=" " * 22))
    return 0


def run_compare(args: argparse.Namespace) -> int:
    # These matrices are too small to share between threads: one thread is faster, and gives
    # the same bits whatever the number of cores.
    torch.set_num_threads(1)
    asked = {name: value for name, value in vars(args).items() if value is not None}
    own = [field.name for field in dataclasses.fields(Options)]
    given = {name: asked[name] for name in own if name in asked}
    given["changes"] = {
        name: asked[name] for name in ("rank", "top_k", "tau", "delta") if name in asked
    }
    given["schemes"] = [canonical(name) for name in asked.get("schemes", [])]
    given |= {name: canonical(given[name]) for name in ("stream", "backbone") if name in given}
    if args.resume and args.out is None:
        args.out = latest("compare")
    options = Options.of(args.out).extended(given) if args.resume else fresh(given)
    device_is_here(options.device)
    parallel.start(options.device)
    first = parallel.process() == 0
    out = args.out if args.resume else output_folder("compare", args.out) if first else None
    out = parallel.agreed(out)
    fixed = {name: getattr(options, name) for name in FIXED}
    setting = Setting(
        *(options.stream, options.backbone, options.targets, options.tasks, options.device)
    )
    model = setting.new_model(options.seeds[0])
    stream = stream_of(setting, options.seeds[0])
    schemes = choose(options.schemes or None, stream, model, setting.tuned_as)
    total = len(schemes) * len(options.seeds) * options.tasks
    with console.Progress("task", f"writing to {out}", hidden=not first, trains=True) as bar:
        result = compare(
            out,
            schemes=schemes,
            seeds=options.seeds,
            tasks=options.tasks,
            changes=options.changes,
            done=lambda label, tasks: bar(label, tasks, total),
            jobs=args.jobs,
            **fixed,
        )
    if not first:
        return 0
    files = report(result, out, options.command(usual_schemes(model)))
    print(table(result, console.width()))
    print("", *files, sep="\n")
    return 0


def fresh(given: dict[str, Any]) -> Options:
    """The options of a run that starts, before any of it is made."""
    usual = streams.usual_tasks(given.get("stream", Options.stream))
    options = Options(**{"tasks": usual, **given})
    seeds = list(dict.fromkeys(options.seeds))
    streams.require_seeds(seeds)
    return dataclasses.replace(options, seeds=seeds)


def draw(kind: str, result: Any, folder: Path) -> list[str]:
    """Draw a result of `compare`, `study` or `bench`; returns the names of the pictures."""
    from .tools import plots  # here, so that what draws nothing needs no matplotlib

    if kind == "compare":
        return draw_compare(result, folder)
    if kind == "study":
        plots.plot_study(result, folder / f"{result.study}.png")
        return [f"{result.study}.png"]
    plots.plot_bench(result, bench.first_routing(result), folder / "bench.png")
    if not any(row["part"] == "growth" for row in result["rows"]):
        return ["bench.png"]
    plots.plot_growth(result, folder / "growth.png")
    return ["bench.png", "growth.png"]


READ = {"compare": CompareResult.read, "study": StudyResult.read, "bench": bench.read}


@contextlib.contextmanager
def result_of(path: Path) -> Iterator[tuple[str, Any]]:
    """The kind of a stored result, and the result. Raises FileNotFoundError; ValueError also if
    what is done with it inside shows that its parts do not fit together."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, allowed: a file, as its compare.json")
    kind, _ = read_json(path, *READ, mend=MEND)
    result = READ[kind](path)
    try:
        yield kind, result
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its parts do not fit ({error}); {MEND}") from error


def run_plot(args: argparse.Namespace) -> int:
    out = args.file.parent if args.out is None else args.out
    with result_of(args.file) as (kind, result):
        out.mkdir(parents=True, exist_ok=True)
        pictures = draw(kind, result, out)
    print(*(out / name for name in pictures), sep="\n")
    return 0


def run_table(args: argparse.Namespace) -> int:
    tables: Any = {"compare": table, "study": study_table, "bench": bench.table}
    with result_of(args.file) as (kind, result):
        if args.format == "text":
            text = tables[kind](result, console.width())
        else:
            text = formatted(kind, result, args.format)
    print(text)
    return 0


def run_study(args: argparse.Namespace) -> int:
    if args.name not in (*STUDIES, "all"):
        raise ValueError(f"study is {args.name!r}, allowed: {', '.join(STUDIES)}, all")
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"jobs is {args.jobs}, allowed: 1 or more")
    for name in STUDIES if args.name == "all" else [args.name]:
        usual = (0, 1) if args.quick else STUDIES[name].seeds
        seeds = list(dict.fromkeys(args.seeds or usual))
        with console.Progress("cell", f"writing to {args.out}", trains=True) as bar:
            result = studies.run_study(
                name, args.out, seeds, args.quick, args.jobs or -1, bar, console.say
            )
        print(study_table(result, console.width()))
        files = [args.out / f"{name}.json", args.out / f"{name}.png", args.out / "findings.md"]
        print("", *files, sep="\n")
        flush()
    return 0


def run_check(args: argparse.Namespace) -> int:
    names = list(dict.fromkeys(args.schemes))
    jobs = joblib.cpu_count() if args.jobs is None else args.jobs
    ways = {name: getattr(args, name) for name in ("device", "within")}
    ways = {name: value for name, value in ways.items() if value is not None}
    if args.theirs:
        with console.Progress("scheme") as bar:
            results = same_apart(names, args.theirs, jobs, args.seconds, bar, **ways)
    elif ways:
        raise ValueError(f"--{' --'.join(ways)} is for --as NAME")
    else:
        with console.Progress("law") as bar:
            results = check_apart(names, jobs, args.seconds, bar)
    if args.json:
        found = laws.CheckResult.of(args.theirs or "laws", results)
        print(sealed("check", to_json(found)))
    elif args.theirs:
        dash = "not looked at, or nowhere to be seen in what is no Adapter"
        of = (laws.STEPS, "step", f"is not {args.theirs} in", dash)
        print(laws.table(results, console.width(), *of))
    else:
        print(laws.table(results, console.width()))
    return int(any(row.verdict == "broken" for rows in results.values() for row in rows))


def run_new_scheme(args: argparse.Namespace) -> int:
    name, path = args.name, Path(f"{args.name}.py")
    title = "".join(part.capitalize() for part in name.split("_"))
    text = (Path(__file__).parent / "laws" / "template.py").read_text(encoding="utf-8")
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError(f"name is {name!r}, allowed: a module's name, as in my_gate")
    if os.path.lexists(path):
        raise ValueError(f"{path} is there already")
    known = find_spec(name) or name in sys.stdlib_module_names
    if known or any(map(keyword.iskeyword, (name, title))):
        raise ValueError(f"name is {name!r}, allowed: one that Python does not know yet")
    if re.search(rf"\b{title}\b", text):
        raise ValueError(f"name is {name!r}, allowed: one whose class, {title}, is no name yet")
    text = text.replace("NewScheme", title).replace("new_scheme", name)
    write_atomic(path, text.encode())
    print(f"{path}\n\nminimoe check {path}:{title}")
    return 0


def run_bench(args: argparse.Namespace) -> int:
    device_is_here(args.device)
    on_cpu = torch.device(args.device).type == "cpu"
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"threads is {args.threads}, allowed: 1 or more")
        torch.set_num_threads(args.threads)
    threshold("small", not on_cpu)  # a wrong MINIMOE_BENCH is told before anything is made
    out = output_folder("bench", args.out)
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)  # now, not after minutes of timing
    ranks = args.ranks or [64, 256, 512, 1024, 4096, *([] if on_cpu else [8192, 16384])]
    widths = args.width or ([768] if on_cpu else [1024, 4096])

    def save(result: dict[str, Any]) -> None:
        write_json(out / "bench.json", "bench", to_json(result))

    try:
        with console.Progress("group", f"writing to {out}") as bar:
            result = bench.bench(
                device=args.device,
                dtype=getattr(torch, dtype),
                tokens=args.tokens,
                width=tuple(dict.fromkeys(widths)),
                top_k=args.top_k,
                ranks=tuple(dict.fromkeys(ranks)),
                routings=tuple(dict.fromkeys(args.routing or bench.ROUTINGS)),
                repeats=args.repeats,
                done=lambda label, total: bar(label, 1, total),
                save=save,
            )
    except BaseException as error:
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()
        full = isinstance(error, RuntimeError) and re.search("memory|overflow", str(error))
        if full or isinstance(error, MemoryError):
            raise ValueError(f"too large to be timed here: {error}") from error
        raise
    pictures = draw("bench", result, out)
    write_atomic(out / "bench.md", bench.page(result, args.typed, *pictures).encode())
    print(bench.table(result, console.width()))
    print("", *(out / name for name in ("bench.json", "bench.md", *pictures)), sep="\n")
    wrong = [row for row in result["errors"] if not row["error"] <= row["allowed"]]
    return 1 if wrong else 0


def latest(command: str) -> Path:
    """The last of the folders that a command names by itself."""
    usual = OUT[command]
    names = (Path(usual if n == 1 else f"{usual}-{n}") for n in itertools.count(1))
    taken = list(itertools.takewhile(Path.exists, names))
    return taken[-1] if taken else Path(usual)


def output_folder(command: str, given: Path | None) -> Path:
    """The folder of a run that starts, not made yet; none that holds a run."""
    if given is None:
        last = latest(command)
        if not last.exists():
            return last
        number = 1 + int(last.name.removeprefix(OUT[command]).removeprefix("-") or 1)
        return Path(f"{OUT[command]}-{number}")
    if any((given / name).exists() for name in (RUN, f"{command}.json")):
        go_on = "--resume goes on, " if command == "compare" else ""
        raise ValueError(f"{given} holds a run already: {go_on}another --out keeps both")
    return given
