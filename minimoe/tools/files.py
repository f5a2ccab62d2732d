"""Files that are whole or not there, and that say what they hold: all files of this package are
written and read here.

A file that is read back carries a seal: its kind, the version of its format, and a SHA-256 of what
it holds. A file that was changed or cut short, that is of another kind or format, or that something
else wrote, is refused in one line. (Whether it is the file of this run, its readers see.)
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows, where no file can be removed that somebody has open
    fcntl = None  # type: ignore[assignment]

VERSION = 1  # of the format of every file that is read back
DRAFT = ".minimoe-draft-"


def write_atomic(path: str | Path, data: bytes) -> None:
    """Put data at path: a reader, or a kill at any moment, finds the old file or the new one.

    As with an editor, a link is followed, and the file keeps its mode. Drafts of writers that were
    killed are removed from the folder. Raises OSError, the old file being as it was; ValueError if
    what is there is no file.
    """
    path = Path(os.path.realpath(path))
    there = path.lstat() if os.path.lexists(path) else None
    if there and not stat.S_ISREG(there.st_mode):
        raise ValueError(f"{path} is there, and is no file")
    if there and not os.access(path, os.W_OK):
        raise PermissionError(f"{path} is read-only")
    _remove_dead_drafts(path.parent)
    with _draft(path.parent) as (file, draft):
        file.write(data)
        file.flush()
        if there:
            os.chmod(draft, stat.S_IMODE(there.st_mode))
        os.fsync(file.fileno())
        if fcntl is None:
            file.close()
        os.replace(draft, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def _draft(folder: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file with a name that nobody can guess, locked while it is in use."""
    while True:
        draft = folder / f"{DRAFT}{secrets.token_hex(8)}"
        with open(draft, "xb") as file:  # x: not if anything is there, not even a link
            try:
                if fcntl is not None:
                    with contextlib.suppress(OSError):  # a file system without locks
                        fcntl.flock(file, fcntl.LOCK_EX)
                    if not draft.exists():  # another writer took it for a dead one's
                        continue
                yield file, draft
                return
            finally:
                draft.unlink(missing_ok=True)


def _remove_dead_drafts(folder: Path) -> None:
    """Remove the drafts that no living writer has locked."""
    for draft in folder.glob(f"{DRAFT}*"):
        with contextlib.suppress(OSError):  # locked, or gone by now
            if fcntl is None:
                draft.unlink()
                continue
            descriptor = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                draft.unlink()
            finally:
                os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the folder's new entry on the disk, where a folder can be asked for that."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def write_json(path: str | Path, kind: str, content: dict[str, Any]) -> None:
    """Write content, anything that JSON holds but nan, under the seal "minimoe"."""
    write_atomic(path, f"{sealed(kind, content)}\n".encode())


def sealed(kind: str, content: dict[str, Any]) -> str:
    """The text that `write_json` writes."""
    return json.dumps({"minimoe": _seal(kind, content), **content}, indent=1, allow_nan=False)


def read_json(path: str | Path, *kinds: str, mend: str) -> tuple[str, dict[str, Any]]:
    """The kind and the content of a file of `write_json`.

    mend: what a user can do about a file that is refused, the end of the message.

    Raises FileNotFoundError; ValueError if the file is not whole, or of another kind or format.
    """
    _require_file(path, mend)
    try:
        content = json.loads(Path(path).read_bytes(), parse_constant=_refuse)
        there: Any = content.pop("minimoe", None) if isinstance(content, dict) else None
        kind = _allowed(there, kinds)
        if there["sha256"] != _seal(kind, content)["sha256"]:
            raise ValueError("changed since it was written, its checksum says")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {_words(error)}; {mend}") from None
    return kind, content


def write_tensors(
    path: str | Path, kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]
) -> None:
    """Write a safetensors file, with `facts` (anything JSON holds) and the seal in its header. The
    sum is of the whole file, with noughts where the sum will stand."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entry = {"kind": kind, "version": VERSION, "sha256": _NOUGHTS, "facts": facts}
    data = safetensors.torch.save(tensors, {"format": "pt", "minimoe": json.dumps(entry)})
    write_atomic(path, data.replace(_NOUGHTS.encode(), _sum(data).encode(), 1))


def read_tensors(
    path: str | Path, kind: str, mend: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts of a file of `write_tensors`. Raises as `read_json` does."""
    _require_file(path, mend)
    data = Path(path).read_bytes()
    try:
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        except ValueError:
            raise ValueError("truncated, or no safetensors file") from None
        try:
            entry = json.loads(header["__metadata__"]["minimoe"])
        except (ValueError, TypeError, KeyError):
            entry = None
        _allowed(entry, (kind,))
        sum_there = str(entry["sha256"]).encode()
        if entry["sha256"] != _sum(data.replace(sum_there, _NOUGHTS.encode(), 1)):
            raise ValueError("changed or cut short since it was written, its checksum says")
        if not isinstance(entry.get("facts"), dict):
            raise ValueError("holds no facts")
        return safetensors.torch.load(data), entry["facts"]
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{path}: {_words(error)}; {mend}") from None


_NOUGHTS = "0" * 64


def _require_file(path: str | Path, mend: str) -> None:
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not Path(path).is_file():
        raise ValueError(f"{path}: no file; {mend}")


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _seal(kind: str, content: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps([kind, content], allow_nan=False)  # spaces and line ends do not count
    return {"kind": kind, "version": VERSION, "sha256": _sum(text.encode())}


def _allowed(seal: Any, kinds: tuple[str, ...]) -> str:
    """The kind that a seal names. Raises ValueError unless it is one of these, in our format."""
    if not isinstance(seal, dict) or not {"kind", "version", "sha256"} <= seal.keys():
        raise ValueError("not written by minimoe, or by one before files had checksums")
    if seal["version"] != VERSION:
        raise ValueError(f"of format {seal['version']!r}, this minimoe reads {VERSION}")
    if seal["kind"] not in kinds:
        raise ValueError(f"holds {seal['kind']!r}, allowed here: {', '.join(kinds)}")
    return str(seal["kind"])


def _refuse(name: str) -> None:
    raise ValueError(f"holds {name}, which is no JSON")


def _words(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"truncated, or no JSON ({error})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
