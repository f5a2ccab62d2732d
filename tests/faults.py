"""Kill, corrupt, starve and mistype: python tests/faults.py --kills 1000 --corruptions 500
--errors 200 --mistakes 300

Kills: compare, study, bench and check are killed at random moments, half of them at a random call
to the file system, and gone on with until they finish. Nothing that was finished may be lost, and
the numbers must be those of a run that nobody killed.

Corruptions: files that are read back are damaged (bits, ends, edited JSON, swapped files). The
command must refuse them in one line, or give the same numbers. JSON that is edited and sealed anew
is a forgery, whose numbers nobody can know; it must fit or be one line.

Errors: every write fails once, the disk being full or broken. The command must say so in one line,
and go on to the same numbers when there is room again.

Mistakes: commands with one wrong word or more get one line and status 2, and leave nothing.

Needs os.fork. The tests run a few dozen of each (test_faults.py).
"""

import argparse
import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from minimoe import MoRA
from minimoe.adapt import adapt, load, save, state
from minimoe.cli import main
from minimoe.continual.backbones import Backbone
from minimoe.continual.learn import PRETRAIN
from minimoe.options import RUN
from minimoe.tools import plots  # noqa: F401  (before the forks, which then have it)
from minimoe.tools.files import DRAFT, VERSION, read_json, read_tensors, write_json

COMMANDS = {
    "compare": "compare --stream permuted-digits --schemes lora mora --tasks 2 --epochs 1 --rank 4 "
    "--out run",
    "study": "study grain --quick --seeds 0 --jobs 1 --out run",
    "bench": "bench --ranks 16 --tokens 32 --width 16 --top-k 4 --repeats 1 --routing random "
    "--out run",
    "check": "check lora",
}
WEIGHTS = {"compare": 5, "study": 3, "bench": 1, "check": 1}
CALLS = ("open", "fsync", "chmod", "replace", "write")


def words(name, folder):
    """The command; or, in a folder with a run of compare, the one that goes on with it."""
    if name == "compare" and (folder / "run" / RUN).exists():
        return ["compare", "--resume", "--out", "run"]
    return COMMANDS[name].split()


def numbers(name, folder):
    """What the command found, without times and sums."""
    if name == "check":
        return None
    file = {"compare": "compare.json", "study": "grain.json", "bench": "bench.json"}[name]
    entry = json.loads((folder / "run" / file).read_text())
    del entry["minimoe"]
    if name == "bench":  # all of it is times
        return [[row["part"], row["pass"], row["name"]] for row in entry["rows"]]
    entry.pop("core_minutes", None)
    for scheme in entry.get("schemes", {}).values():
        del scheme["seconds"], scheme["step"]
    return entry


def forked(folder, arguments, before=lambda: None):
    """Start the command in a process of its own; returns its number. Its output is in files."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.setsid()
        os.chdir(folder)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder.parent / "tmp")
        for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
            stream.flush()
            file = os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, {"stdout": 1, "stderr": 2}[name])
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before()
        status = main(arguments)
        sys.stdout.flush()
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status if isinstance(status, int) else 70)


def ended(child):
    """The status of a process, negative if it was killed by a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_call(n, act):
    """Have `act` called before the n-th call to the file system that writes."""

    def patch():
        left = [n]

        def counted(real, *args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                act()
            return real(*args, **kwargs)

        for call in ("fsync", "chmod", "replace"):
            real = getattr(os, call)
            setattr(os, call, lambda *args, real=real, **kw: counted(real, *args, **kw))
        import builtins

        real_open = open

        class Draft:
            """A draft whose opening and writing count."""

            def __init__(self, path):
                self.file = counted(real_open, path, "xb")

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, data):
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                return counted(self.file.write, data[len(data) // 2 :])

        def opened(file, mode="r", *args, **kwargs):
            return Draft(file) if mode == "xb" else real_open(file, mode, *args, **kwargs)

        builtins.open = opened

    return patch


class Bed:
    """A folder in which one command is run again and again, and what a whole run of it says."""

    def __init__(self, name, at):
        self.name, self.at = name, Path(at) / name
        self.anew()
        self.start = time.perf_counter()
        status = ended(forked(self.folder, words(name, self.folder)))
        self.seconds = time.perf_counter() - self.start
        if status:
            raise AssertionError(f"{name} alone ends with {status}: {self.error()}")
        self.whole = numbers(name, self.folder)
        self.held = self.finished()

    @property
    def folder(self):
        return self.at / "here"

    def anew(self):
        shutil.rmtree(self.at, ignore_errors=True)
        self.folder.mkdir(parents=True)
        (self.at / "tmp").mkdir()

    def error(self):
        return (self.at / "stderr").read_text()

    def finished(self):
        """The files that are finished work. Raises if one of them is not whole."""
        done = set()
        for path in (self.folder / "run").rglob("*"):
            if path.name.startswith(DRAFT) or not path.is_file():
                continue
            if path.suffix == ".safetensors":
                read_tensors(path, "checkpoint", mend="")
            elif path.suffix == ".json":
                read_json(path, "run", "compare", "study", "cell", "bench", mend="")
            done.add(path)
        return done

    def litter(self):
        return [p for p in self.folder.rglob("*") if p.name.startswith(DRAFT)]


def kills(count, at, seed=0, say=print):
    """Kill so many times. Returns what went wrong, a line each."""
    draw, wrong, seen = random.Random(seed), [], Counter()
    beds = {name: Bed(name, at) for name in COMMANDS}
    for bed in beds.values():
        bed.anew()
    while seen["killed"] < count:
        name = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        bed = beds[name]
        if name == "bench" and (bed.folder / "run" / "bench.json").exists():
            bed.anew()  # it is done but for its page, and no run of bench goes on
        before = bed.finished()
        by_call = draw.random() < 0.5 and name != "check"
        if by_call:
            n = draw.randrange(1, 30)
            kill = at_call(n, lambda: os.kill(os.getpid(), signal.SIGKILL))
            status = ended(forked(bed.folder, words(name, bed.folder), kill))
        else:
            child = forked(bed.folder, words(name, bed.folder))
            time.sleep(draw.uniform(0, min(bed.seconds, 4) * 1.05))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            status = ended(child)
        try:
            after = bed.finished()
        except ValueError as error:
            wrong.append(f"{name}: not whole after a kill: {error}")
            bed.anew()
            continue
        if before - after:
            wrong.append(f"{name}: lost {sorted(p.name for p in before - after)}")
        if status == -signal.SIGKILL:
            seen["killed"] += 1
            seen[name] += 1
            if name == "check" and list(bed.folder.iterdir()):
                wrong.append(f"check left {list(bed.folder.iterdir())}")
            continue
        seen["finished"] += 1
        if status or numbers(name, bed.folder) != bed.whole:
            wrong.append(f"{name}: status {status}, or other numbers: {bed.error()[-300:]}")
        if bed.litter():
            wrong.append(f"{name}: drafts are left: {bed.litter()}")
        bed.anew()
    say(f"kills: {dict(seen)}; wrong: {len(wrong)}")
    return wrong


def edits(draw, entry):
    """One random change of a JSON value, deep in it."""
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(entry)
    node, key = draw.choice(places)
    odd = [None, [], {}, "odd", -1, 0, 1e300, 7.5, True, [[1]], {"a": 1}, float("nan")]
    change = draw.randrange(4)
    if change == 0:
        del node[key]
    elif change == 1 and isinstance(node, dict):
        node["more"] = draw.choice(odd)
    elif change == 2 and isinstance(node[key], float | int):
        node[key] = node[key] + 1
    else:
        node[key] = draw.choice(odd)
    return entry


def corrupted(draw, path, others):
    """(what was done, whether it is a forgery), the file being damaged."""
    data = path.read_bytes()
    kinds = ["bit", "bits", "cut", "grown", "swapped", "nothing", "noughts"]
    if path.suffix == ".json":
        kinds += ["edited", "edited", "forged", "forged", "forged"]
    kind = draw.choice(kinds)
    at = draw.randrange(len(data))
    if kind == "bit":
        new = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    elif kind == "bits":
        new = bytes(b ^ (draw.random() < 0.01) for b in data)
    elif kind == "cut":
        new = data[:at]
    elif kind == "grown":
        new = data + draw.randbytes(draw.randrange(1, 9))
    elif kind == "swapped":
        new = draw.choice(others).read_bytes()
    elif kind == "nothing":
        new = b""
    elif kind == "noughts":
        new = data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    else:
        entry = edits(draw, json.loads(data))
        if kind == "forged":
            seal = entry.pop("minimoe", None)
            kinds = seal["kind"] if isinstance(seal, dict) and "kind" in seal else "cell"
            try:
                write_json(path, kinds, entry)
            except ValueError:  # nan
                path.write_text(json.dumps({"minimoe": {"version": VERSION}, **entry}))
            return kind, True
        new = json.dumps(entry).encode()
    path.write_bytes(new)
    return kind, False


def quiet(arguments):
    """Status and stderr of the command, in this process; a traceback is status 70."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            return main(arguments), error.getvalue(), out.getvalue()
        except SystemExit as stop:
            return stop.code, error.getvalue(), out.getvalue()
        except BaseException:
            return 70, traceback.format_exc(), out.getvalue()


def one_line(text):
    """Whether what a command says is one error, but for where it writes to and its bar."""
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("minimoe: error: ")]
    rest = [n for n in lines if n not in errors and "writing to" not in n and "?" not in n]
    return len(errors) == 1 and lines[-1] == errors[0] and not any("Trace" in n for n in rest)


def corruptions(count, at, seed=0, say=print):
    """Damage a file so many times. Returns what went wrong, a line each."""
    draw, wrong, seen = random.Random(seed), [], Counter()
    beds = {name: Bed(name, at) for name in ("compare", "study", "bench")}
    model = adapt(Backbone(), MoRA, targets=r"fc\d", rank=4)
    adapters = Path(at) / "adapters.safetensors"
    save(model, adapters)
    learned = state(model)
    files = [
        (name, p)
        for name, bed in beds.items()
        for p in sorted(bed.held)
        if p.suffix in (".json", ".safetensors")
    ]
    files.append(("adapters", adapters))
    every = [path for _, path in files]
    kept = {path: path.read_bytes() for path in every}
    tables = {}
    for _ in range(count):
        name, path = draw.choice(files)
        how, forged = corrupted(draw, path, every)
        label = f"{name}, {path.name}, {how}"
        changed = path.read_bytes() != kept[path]
        if name == "adapters":
            try:
                load(model, path)
                status, text = 0, ""
                same = all(torch.equal(t, learned[k]) for k, t in state(model).items())
            except ValueError as error:
                status, text, same = 2, f"minimoe: error: {error}\n", True
            except Exception:
                status, text, same = 70, traceback.format_exc(), True
        else:
            folder, back = beds[name].folder, os.getcwd()
            os.chdir(folder)
            if path.name in ("compare.json", "grain.json", "bench.json"):
                form = draw.choice(["text", "csv", "latex", "markdown"])
                shown = str(path.relative_to(folder))
                status, text, printed = quiet(["table", shown, "--format", form])
                if not changed:
                    tables[path, form] = printed
                same = status != 0 or tables.get((path, form), printed) == printed
                if status == 0:
                    drawn = quiet(["plot", shown, "--out", "../drawn"])
                    status, text = (drawn[0], drawn[1]) if drawn[0] else (status, text)
            else:
                status, text, _ = quiet(words(name, folder))
                same = status != 0 or numbers(name, folder) == beds[name].whole
            os.chdir(back)
        for other, data in kept.items():
            if other.exists() and other.read_bytes() == data:
                continue
            other.write_bytes(data)
        if status == 0:
            seen["harmless" if not forged else "forged, and fits"] += 1
            if not same and not forged:
                wrong.append(f"{label}: other numbers")
        elif status == 2 and one_line(text):
            seen["refused"] += 1
        else:
            wrong.append(f"{label}: status {status}: {text[-1500:]}")
    say(f"corruptions: {dict(seen)}; wrong: {len(wrong)}")
    return wrong


def errors(count, at, seed=0, say=print):
    """Have a write fail so many times. Returns what went wrong, a line each."""
    draw, wrong, seen = random.Random(seed), [], Counter()
    beds = {name: Bed(name, at) for name in ("compare", "study", "bench")}
    for bed in beds.values():
        bed.anew()
    while sum(seen.values()) < count:
        name = draw.choice(["compare"] * 8 + ["study", "bench"])
        bed, n = beds[name], draw.randrange(1, 36)
        number = draw.choice([errno.EIO, errno.ENOSPC])

        def fails(number=number):
            raise OSError(number, os.strerror(number))

        status = ended(forked(bed.folder, words(name, bed.folder), at_call(n, fails)))
        try:
            bed.finished()
        except ValueError as error:
            wrong.append(f"{name}, call {n}: not whole: {error}")
        if status == 0:  # there was no such call any more
            bed.anew()
            continue
        seen[os.strerror(number)] += 1
        if status != 2 or not one_line(bed.error()) or bed.litter():
            wrong.append(f"{name}, call {n}: status {status}: {bed.error()[-800:]}")
        again = COMMANDS[name].split() if name == "bench" else words(name, bed.folder)
        if name == "bench":
            shutil.rmtree(bed.folder / "run", ignore_errors=True)
        status = ended(forked(bed.folder, again))
        if status or numbers(name, bed.folder) != bed.whole:
            wrong.append(f"{name}, call {n}: did not go on: {bed.error()[-800:]}")
        bed.anew()
    say(f"errors: {dict(seen)}; wrong: {len(wrong)}")
    return wrong


WRONG = {  # what no command takes, by option; the words "" come without an option
    "compare": {
        "--stream": ["", "digits", "permuted", "planted,repeat"],
        "--schemes": [
            "",
            "moar",
            ":",
            "a:",
            "gone.py:Mine",
            "file:Mine",
            "own.py:",
            "own.py:Gone",
            "own.py:Plain",
            "own.py:Raises",
            "own.py:Leaves",
            "lora,mora",
            "all nope",
        ],
        "--seeds": ["", "-1", "1.5", "x", "1e3", "4294967296", "0 -7", "1 99999999999999999999"],
        "--tasks": ["", "0", "-3", "x", "1001", "9" * 30, "2.5"],
        "--epochs": ["", "0", "-1", "x", "1.5"],
        "--rank": ["", "0", "-1", "65", "x", "9" * 30],
        "--top-k": ["", "0", "-1", "x"],
        "--tau": ["", "0", "-1", "nan", "x", "-inf"],
        "--delta": ["", "nan", "x"],
        "--device": ["", "gpu", "cuda:99", "cpu:1", "meta", ":", "cpu:-1"],
        "--out": ["file", "file/run"],
        "--resume": [""],
        "--wat": [""],
        "": ["odd"],
    },
    "study": {
        "--seeds": ["", "-1", "x", "4294967296", "0 -1"],
        "--jobs": ["", "0", "-1", "x"],
        "--out": ["file", "file/run"],
        "": ["odd", "all all", "", "grain.json"],
        "--resume": [""],
    },
    "check": {
        "": [
            "",
            "moar",
            "joint",
            "a:",
            ":",
            "gone.py:Mine",
            "file:Mine",
            "own.py:Gone",
            "own.py:Plain",
            "own.py:Raises",
            "own.py:Leaves",
            "mora moar",
            "all",
        ],
        "--out": ["run"],
    },
    "new-scheme": {
        "": [
            "",
            "my-gate",
            "../gate",
            "lambda",
            "none",
            "true",
            "_",
            "__init__",
            "torch",
            "json",
            "minimoe",
            "Gate",
            "gate",
            "adapter",
            "own",
            "a b",
            "é",
            "1a",
            "x.py",
        ],
    },
    "bench": {
        "--device": ["gpu", "cuda:99", "cpu:1", "meta", ""],
        "--dtype": ["int8", "", "float"],
        "--tokens": ["0", "-1", "x", "1.5"],
        "--width": ["0", "15", "-1", "x"],
        "--top-k": ["0", "-1", "x"],
        "--ranks": ["0", "15", "-64", "x", "64 3"],
        "--routing": ["hot", "", "random hot"],
        "--repeats": ["0", "-1", "x"],
        "--threads": ["0", "-2", "x"],
        "--out": ["file", "file/run"],
    },
    "list": {"": ["lora"], "--json": [""]},
    "plot": {"": ["", "gone.json", "file", "own.py", "."], "--format": ["png"]},
    "table": {"": ["", "gone.json", "file", "own.py", "."], "--format": ["pdf", ""]},
    "": {"": ["odd", "--wat", "-1"]},
}
OWN = """
import minimoe
class Plain: pass
class Raises(minimoe.Adapter):
    def __init__(self, *args, **settings): raise RuntimeError("two\\nlines")
class Leaves(minimoe.Adapter):
    def __init__(self, *args, **settings): raise SystemExit
"""


def mistakes(count, at, seed=0, say=print):
    """Mistype a command so many times. Returns what went wrong, a line each."""
    draw, wrong, seen, back = random.Random(seed), [], Counter(), os.getcwd()
    every = [
        (c, option, value)
        for c, options in WRONG.items()
        for option, values in options.items()
        for value in values
    ]
    draw.shuffle(every)
    while len(every) < count:
        every += draw.sample(every, min(len(every), count - len(every)))
    for n, (command, option, value) in enumerate(every[:count]):
        typed = [command] if command else []
        more = [draw.choice(every) for _ in range(draw.randrange(3) if n % 2 else 0)]
        for _, o, v in [(command, option, value), *(m for m in more if m[0] == command)]:
            typed += ([o] if o else []) + (
                v.split() if v else [""] if o not in ("--resume",) else []
            )
        if command == "study" and option:
            typed.insert(1, "grain")
        if command in ("check", "plot", "table") and option:
            typed.insert(1, {"check": "lora"}.get(command, "file"))
        folder = Path(at) / "mistakes"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "file").write_text("mine")
        (folder / "own.py").write_text(OWN)
        os.chdir(folder)
        status, text, printed = quiet(typed)
        os.chdir(back)
        left = {p.name for p in folder.iterdir()} - {"file", "own.py"}
        lines = text.splitlines()
        seen[command] += 1
        if status != 2 or len(lines) != 1 or not lines[0].startswith("minimoe") or left or printed:
            wrong.append(f"{typed}: status {status}, left {left}: {text[-600:]}")
    say(f"mistakes: {dict(seen)}; wrong: {len(wrong)}")
    return wrong


def run():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for part in ("kills", "corruptions", "errors", "mistakes"):
        parser.add_argument(f"--{part}", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    PRETRAIN["epochs"] = 1  # files are what is looked at, and accuracies only have to repeat
    wrong = []
    for part in (kills, corruptions, errors, mistakes):
        if count := getattr(args, part.__name__):
            with tempfile.TemporaryDirectory() as at:
                wrong += part(count, at, args.seed)
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(run())
