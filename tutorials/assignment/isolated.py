"""Code that nobody has looked at, in a process of its own: it has limits, and hands over data.

The process is forked from a server that has imported minimoe and knows nothing of the grader: no
secret, no labels. What it hands over is a file in its own folder: a token, a line of JSON, an array
of plain numbers. So nothing that it prints is read, and nothing that it wrote is run.
"""

import ctypes
import json
import multiprocessing
import os
import resource
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEMORY = 6 * 2**30  # bytes of address space, of which torch itself takes one or two
FILE = 64 * 2**20  # bytes of a file that it writes
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["warm"])

Handed = tuple[Any, np.ndarray]  # what JSON holds, and numbers


class Lost(Exception):
    """A process handed nothing over. The message says why."""


def alone(
    call: Callable[..., Handed], file: Path, *args: Any, seconds: float, user: int | None = None
) -> Handed:
    """What call(path, *args) returns in a process of its own, path being a copy of file in a folder
    of its own, where it stands. user: the number of the user that it is; by default who calls.

    Raises Lost if it raises, ends, or takes longer than seconds; or if a function of minimoe, torch
    or NumPy is another after it than before.
    """
    if seconds <= 0:
        raise Lost("no time was left")
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = Path(shutil.copyfile(file, Path(folder, "scheme.py")))
        if user is not None:
            for path in (folder, copy):
                os.chown(path, user, user)
        process = CONTEXT.Process(target=_work, args=(call, copy, token, seconds, user, args))
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # where the server finds `warm`
        process.start()
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
        try:
            process.join(seconds)
            ended = process.exitcode
        finally:
            _end(process)
        if ended is None:
            raise Lost(f"takes longer than {seconds:g} s")
        return _read(Path(folder, "handed"), token, ended)


def _end(process: Any) -> None:
    """Kill it, and what it has started in its session."""
    for kill in (os.killpg, os.kill):
        try:
            kill(process.pid, signal.SIGKILL)
        except OSError:  # gone
            continue
    process.join()


def _read(path: Path, token: str, status: int) -> Handed:
    try:  # no link is followed, and nobody waits for a pipe
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            head, _, rest = (file.read(FILE) or b"").partition(b"\n")
            said, _, numbers = rest.partition(b"\n")
        if not secrets.compare_digest(head, token.encode()):
            raise ValueError("no token")
        lost, value, dtype, shape = json.loads(said)
        array = np.frombuffer(numbers, np.dtype(dtype)).reshape(shape)
    except (OSError, ValueError, TypeError, RecursionError):
        if status < 0:
            raise Lost(f"has its process killed by signal {-status}") from None
        raise Lost(f"ends its process with status {status}") from None
    if lost is not None:
        raise Lost(lost)
    return value, array


# In the process


def _work(
    call: Callable[..., Handed],
    path: Path,
    token: str,
    seconds: float,
    user: int | None,
    args: tuple[Any, ...],
) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # whose locks leave nothing to clean up
    os.chdir(path.parent)
    tempfile.tempdir = os.environ["HOME"] = str(path.parent)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    os.closerange(3, 4096)  # the server's, which ends when nobody has them any more
    whole = int(seconds) + 1
    for limit, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, whole),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),  # no process more, no thread; root has no such limit
    ):
        resource.setrlimit(limit, (most, most))
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends when the server does
    torch.set_num_threads(1)
    value, array, lost, before = None, np.zeros(0), None, _functions()
    try:
        value, array = call(path, *args)
    except BaseException as error:  # whatever somebody's file does
        lost = f"{type(error).__name__}: {error}"[:500]
    for space, names in _functions().items():  # torch.compile adds names like __compiled_fn_1
        for name, what in names.items() if space in before else ():
            new = name not in before[space]
            if not (new and name.startswith("__")) and before[space].get(name) != what:
                lost = f"changes {space}.{name}"
    said = json.dumps([lost, value, array.dtype.str, array.shape]).encode()
    (path.parent / "handed").write_bytes(b"\n".join([token.encode(), said, array.tobytes()]))
    os._exit(0)  # nothing that it has left to be done at the end


def _functions() -> dict[str, dict[str, tuple[int, int]]]:
    """What the functions and classes are, by name, of each module and class that shall not change:
    all of minimoe's, and those of others that SPACES names."""
    spaces = {name: vars(sys.modules[name]) for name in SPACES} | {"torch.Tensor": vars(Tensor)}
    for module, names in [*sys.modules.items()]:
        if module.partition(".")[0] == "minimoe":
            spaces[module] = vars(names)
            for name, what in [*vars(names).items()]:
                if isinstance(what, type) and what.__module__ == module:
                    spaces[f"{module}.{name}"] = vars(what)
    return {
        space: {
            name: (id(what), id(getattr(what, "__code__", None)))
            for name, what in [*names.items()]
            if callable(what)
        }
        for space, names in spaces.items()
    }


SPACES = ("builtins", "json", "numpy", "os", "torch", "torch.autograd", "torch.nn.functional")
