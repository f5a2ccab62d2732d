"""The console as a user has it: narrow, of an old encoding, closed, or stopped."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimoe.cli import main
from minimoe.laws import LAWS
from minimoe.tools import console

posix = pytest.mark.skipif(os.name != "posix", reason="terminals and signals are POSIX's")
COMMAND = [sys.executable, "-W", "error", "-m", "minimoe"]
SMALL = ["compare", "--stream", "permuted-digits", "--schemes", "lora", "mora"]
SMALL += ["--tasks", "2", "--epochs", "1", "--out", "run"]


def test_characters_that_an_encoding_lacks_are_shown_by_others_of_their_width():
    for encoding, shown in (
        ("ascii", ".5~.1 - > 1 e |x| ?"),
        ("cp1252", ".5±.1 – > 1 é |x| ?"),
        ("utf-8", ".5±.1 – ≥ 1 é ‖x‖ 猫"),
    ):
        data = io.BytesIO()
        stream = io.TextIOWrapper(data, encoding=encoding)
        with contextlib.redirect_stdout(stream):
            console.degrade()
            print(".5±.1 – ≥ 1 é ‖x‖ 猫", end="")
            stream.flush()
        assert data.getvalue().decode(encoding) == shown


def test_minimoe_alone_shows_help(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    for command in ("compare", "study", "check", "new-scheme", "bench", "list", "plot", "table"):
        assert f"    {command} " in printed


@posix
@pytest.mark.slow
def test_a_table_fits_a_terminal_and_is_whole_in_a_file(tmp_path):
    import pty

    main_end, terminal = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(
        [*COMMAND, *SMALL, "--seeds", "0", "1"], cwd=tmp_path, stdout=terminal, env=environment,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(main_end, 10_000):
            shown += part
    os.close(main_end)
    assert process.wait() == 0
    lines = shown.decode().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("mora ") for line in lines) == 4  # both tables in two parts
    page = (tmp_path / "run" / "compare.md").read_text().splitlines()
    assert sum(line.startswith("mora ") for line in page) == 2
    assert max(len(line) for line in page if line.startswith("mora ")) > 80


@posix
@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_old_encoding_loses_no_result(encoding, tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [*COMMAND, "check", "lora"], cwd=tmp_path, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).count("held") >= len(LAWS) - 3
    assert b"Error" not in done.stderr


WIDE = Path(__file__).parent.parent.parent / "tutorials" / "findings" / "why.json"


@posix
@pytest.mark.parametrize("words", [["list"], ["table", WIDE, "--format", "csv"]])
def test_nobody_reads_what_is_printed(words, tmp_path):
    process = subprocess.Popen(
        [*COMMAND, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
@pytest.mark.parametrize("words", [["list"], ["table", WIDE, "--format", "csv"]])
def test_what_cannot_be_printed_is_one_line(words, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *words], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("minimoe: error: ") and "No space left" in line


LOUD = """
import atexit
print("at import")
import minimoe

class Loud(minimoe.LoRA):
    def gate(self, x):
        print("in the gate")
        return super().gate(x)
"""


@pytest.mark.slow
def test_json_is_json_whatever_else_prints(tmp_path):
    (tmp_path / "loud.py").write_text(LOUD)
    words = [*COMMAND, "check", "loud.py:Loud", "--json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert len(json.loads(done.stdout)["schemes"]["loud.py:Loud"]) == len(LAWS)
    assert "at import" in done.stderr and "in the gate" in done.stderr


@posix
@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("command", "mark"),
    [
        ("check mora", "law"),
        ("compare --stream permuted-digits --schemes mora --tasks 50 --out run", "task"),
        ("study routing --quick --jobs 2 --out run", "cell"),
        ("bench --repeats 200 --tokens 64 --width 64 --top-k 4 --ranks 64 --out run", "group"),
    ],
)
def test_a_stopped_command_says_so_in_a_line(command, mark, stop, tmp_path):
    # PYTHONWARNINGS, which its processes can add to, unlike -W; no interpreter of kernels, which
    # takes minutes for bench's check of the paths
    usual = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, "-m", "minimoe", *command.split()],
        env=usual | {"PYTHONWARNINGS": "error"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # whoever started the tests in the background had SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        said = b""
        while mark.encode() not in said:  # the bar: it has started
            more = process.stderr.read1()
            assert more, said  # it has ended
            said += more
        time.sleep(0.5)
        os.killpg(process.pid, stop) if stop == signal.SIGINT else process.send_signal(stop)
        out, rest = process.communicate(timeout=60)
        said = (said + rest).decode().replace("\r", "\n")
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[stop], said
        last = [line for line in said.splitlines() if line.strip()][-1]
        word = "interrupted" if stop == signal.SIGINT else "terminated"
        assert last.startswith(f"minimoe: error: {word}") and out == b""
        assert "Traceback" not in said and said.count("error") == 1
        made = {p.name for p in tmp_path.iterdir()}
        assert made == (set() if command.startswith("check") else {"run"})
        until = time.monotonic() + 20
        while time.monotonic() < until:  # nobody of its group is left
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            alive = subprocess.run(
                ["ps", "-o", "stat=", "-g", str(process.pid)], capture_output=True, text=True
            ).stdout.split()
            if all(state.startswith("Z") for state in alive):
                break
            time.sleep(0.2)
        else:
            raise AssertionError("a process is left")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def interruptible():
    """As in a foreground; what a shell starts with `&` ignores Ctrl-C."""
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, was)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("error", [KeyboardInterrupt, console.Stopped])
def test_a_stop_waits_where_it_is_held(error):
    number = signal.SIGTERM if error is console.Stopped else signal.SIGINT
    after = []
    with console.stoppable(), pytest.raises(error):
        with console.held():
            with console.held():
                signal.raise_signal(number)
            after.append("in the outer one")
        after.append("behind it")
    assert after == ["in the outer one"]
    with console.stoppable(), console.held():
        pass  # a new command


def test_a_stop_that_somebody_swallowed_is_raised_again():
    bar = console.Progress("law", hidden=True)
    before = signal.getsignal(signal.SIGTERM)
    with console.stoppable():
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(console.Stopped):
            bar("anything", 1, 2)
    assert signal.getsignal(signal.SIGTERM) == before
    with console.stoppable():
        bar("anything", 1, 2)  # a new command
