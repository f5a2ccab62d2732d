"""Files: whole or not there, whoever writes beside, and refused when they are not what they say."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch

from minimoe.tools import files
from minimoe.tools.files import read_json, read_tensors, write_atomic, write_json, write_tensors

posix = pytest.mark.skipif(os.name != "posix", reason="modes, links and locks are POSIX's")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_a_file_keeps_its_mode_and_a_new_one_has_the_usual(mode, tmp_path):
    path, usual = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"old")
    path.chmod(mode)
    write_atomic(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_bytes() == b"new"
    usual.write_bytes(b"")
    write_atomic(tmp_path / "c", b"new")
    assert (tmp_path / "c").stat().st_mode == usual.stat().st_mode


@posix
def test_a_link_is_followed(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("far/file")
    (tmp_path / "dangling").symlink_to("far/other")
    write_atomic(tmp_path / "link", b"new")
    write_atomic(tmp_path / "dangling", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "far" / "file").read_bytes() == b"new"
    assert names(tmp_path / "far") == ["file", "other"]
    assert names(tmp_path) == ["dangling", "far", "link"]


@posix
def test_what_is_no_file_is_left_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "folder", "loop"):
        with pytest.raises(ValueError, match="is there, and is no file"):
            write_atomic(tmp_path / name, b"new")
    assert names(tmp_path) == ["folder", "loop", "pipe"]


@posix
def test_a_draft_follows_no_planted_link(tmp_path, monkeypatch):
    """Whoever guesses the name of a draft can at most have the writer fail."""
    (tmp_path / "precious").write_bytes(b"mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "guessed")
    (tmp_path / f"{files.DRAFT}guessed").symlink_to("precious")
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "precious").read_bytes() == b"mine" and not (tmp_path / "a").exists()


def test_names_as_long_as_can_be(tmp_path):
    path = tmp_path / ("n" * 251 + ".bin")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and len(names(tmp_path)) == 1
    with pytest.raises(OSError):
        write_atomic(tmp_path / ("n" * 256), b"new")


@posix
def test_the_next_writer_removes_a_dead_ones_draft_and_no_living_ones(tmp_path):
    code = (
        "import sys, time; from minimoe.tools import files\n"
        f"with files._draft(__import__('pathlib').Path({str(tmp_path)!r})):\n"
        "    print('drafting', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"drafting\n"
    (draft,) = tmp_path.iterdir()
    write_atomic(tmp_path / "a", b"new")
    assert names(tmp_path) == [draft.name, "a"]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    write_atomic(tmp_path / "b", b"new")
    assert names(tmp_path) == ["a", "b"]


def test_many_threads_at_one_path(tmp_path):
    path, failed = tmp_path / "a", []
    everyones = [bytes([n]) * 10_000 for n in range(8)]

    def write(data):
        try:
            for _ in range(30):
                write_atomic(path, data)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=[data]) for data in everyones]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_bytes() in everyones
        time.sleep(0.001)
    assert not failed and names(tmp_path) == ["a"]


@posix
@pytest.mark.parametrize("call", ["fsync", "replace", "chmod", "flock", "open", "write"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_an_error_of_the_disk_leaves_the_old_file(call, number, tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fails(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    if call == "open":
        monkeypatch.setattr("builtins.open", fails)
    elif call == "flock":
        monkeypatch.setattr(files.fcntl, "flock", fails)  # a file system without locks
    elif call == "write":
        real = open

        class Full:
            def __init__(self, *args):
                self.file = real(*args)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def fileno(self):
                return self.file.fileno()

            write = fails

        monkeypatch.setattr("builtins.open", Full)
    else:
        monkeypatch.setattr(os, call, fails)
    if call == "flock":
        write_atomic(path, b"new")
    else:
        with pytest.raises(OSError) as error:
            write_atomic(path, b"new")
        assert error.value.errno == number
    monkeypatch.undo()
    # fsync also keeps the folder, when the new file is already there
    assert path.read_bytes() == (b"new" if call == "flock" else b"old")
    assert names(tmp_path) == ["a"]


@posix
def test_the_folder_is_synced_too(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: synced.append(os.fstat(d).st_mode) or real(d))
    write_atomic(tmp_path / "a", b"new")
    assert [stat.S_ISDIR(mode) for mode in synced] == [False, True]

    def cannot(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not here")

    monkeypatch.setattr(os, "fsync", cannot)
    write_atomic(tmp_path / "a", b"newer")
    assert (tmp_path / "a").read_bytes() == b"newer"


CONTENT = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}


def test_json_reads_as_it_was_written(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, "cell", CONTENT)
    assert read_json(path, "run", "cell", mend="") == ("cell", CONTENT)
    path.write_text(json.dumps(json.loads(path.read_text())))  # laid out in another way
    assert read_json(path, "cell", mend="") == ("cell", CONTENT)
    with pytest.raises(ValueError):
        write_json(path, "cell", {"a": float("nan")})
    assert read_json(path, "cell", mend="") == ("cell", CONTENT)


def test_any_bit_of_a_file_of_tensors_counts(tmp_path):
    path = tmp_path / "a"
    write_tensors(path, "adapters", {"x": torch.arange(3.0), "y": torch.ones(2, 2)}, CONTENT)
    whole = path.read_bytes()
    tensors, facts = read_tensors(path, "adapters", mend="")
    assert facts == CONTENT and tensors["x"].tolist() == [0, 1, 2]
    for at in range(len(whole)):
        for bit in (1, 16, 128):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            with pytest.raises(ValueError, match=r"; mend it$"):
                read_tensors(path, "adapters", mend="mend it")
        path.write_bytes(whole[:at])
        with pytest.raises(ValueError, match=r"; mend it$"):
            read_tensors(path, "adapters", mend="mend it")
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="changed or cut short"):
        read_tensors(path, "adapters", mend="")


def test_any_bit_of_json_counts_or_changes_nothing(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, "cell", CONTENT)
    whole, harmless = path.read_bytes(), 0
    for at in range(len(whole)):
        for bit in (1, 2, 4, 8, 16, 32, 64, 128):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            try:
                assert read_json(path, "cell", mend="mend it") == ("cell", CONTENT)
                harmless += 1  # a space that has become another, a capital in an escape
            except ValueError as error:
                assert str(error).endswith("; mend it") and "\n" not in str(error)
    assert harmless < len(whole)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": NaN}', "holds NaN, which is no JSON"),
        (b"\xff\xfe", "truncated, or no JSON"),
        (b"3", "not written by minimoe"),
        (b'{"minimoe": {"kind": "cell", "version": 1}}', "not written by minimoe"),
        (b'{"minimoe": {"kind": "cell", "version": 1, "sha256": 5}}', "changed since"),
        (b'{"minimoe": {"kind": ["cell"], "version": 1, "sha256": 5}}', "holds \\['cell'\\]"),
    ],
)
def test_a_foreign_file_is_one_line(text, wrong, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"a.json: {wrong}.*; mend it$") as error:
        read_json(path, "cell", mend="mend it")
    assert "\n" not in str(error.value)
    with pytest.raises(
        ValueError, match=r"a.json: (truncated, or no safetensors file|nested.*); mend it$"
    ):
        read_tensors(path, "cell", mend="mend it")
