"""What every module stands on: errors, files, signals, one switch for fast code. A plain module, not from a chapter."""
import errno
import gzip
import hashlib
import io
import json
import os
import secrets
import shutil
import signal
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"  # stands on a line of its own after every document


class InputError(ValueError):
    """A mistake that the user can mend; its one line says what was found, what was expected and what to do."""


def say(message: str) -> None:
    """Write a line to standard error, past a progress bar."""
    tqdm.write(message, file=sys.stderr)


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


FAST = True  # False: every part runs as its chapter teaches it, without the twin that is only faster


def fast(*tensors: Any, numpy: bool = False) -> bool:
    """Say whether a faster twin may work on these tensors: each an ordinary one, and no compiler is looking.

    With `numpy`, also whole, in main memory, and all of one type, 32 or 64 bits: what compiled loops can take."""
    import torch

    if not FAST or torch.compiler.is_compiling():
        return False
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
    if not plain or not numpy:
        return plain
    kinds = {(t.device.type, t.dtype, t.is_contiguous()) for t in tensors}
    return len(kinds) == 1 and kinds <= {("cpu", torch.float32, True), ("cpu", torch.float64, True)}


def cannot_write(path: str | os.PathLike[str], err: Exception) -> InputError:
    """Make the error for a place that cannot be written."""
    why = getattr(err, "strerror", None) or err
    return InputError(f"{path}: cannot write ({why}); free some space or choose another folder")


def aside(path: Path) -> Path:
    """Name the place where an older folder waits until the one that replaces it is there."""
    return path.with_name(f".{path.name}.old.tmp")


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[Any]:
    """Write a file of bytes ("wb"), one of UTF-8 text ("w") or a folder ("dir") all at once.

    Gives the open file, or the path of the folder, under a temporary name in the same place; missing folders above it
    are made. After any failure the old one is untouched and nothing else is left. Raises `InputError` when the place
    cannot be written or is full."""
    target, begun = Path(os.path.realpath(path)), False
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    text: dict[str, Any] = {"encoding": "utf-8", "newline": "\n"} if mode == "w" else {}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if mode == "dir":
            temporary.mkdir()
        with nullcontext(temporary) if mode == "dir" else open(temporary, mode, **text) as file:
            begun = True
            yield file
        for made in (temporary, *temporary.rglob("*")):
            _store(made)
        if mode == "dir" and target.exists():
            shutil.rmtree(aside(target), ignore_errors=True)
            os.replace(target, aside(target))
        os.replace(temporary, target)
        if mode == "dir":
            _store(target.parent)
            shutil.rmtree(aside(target), ignore_errors=True)
    except BaseException as err:
        shutil.rmtree(temporary, ignore_errors=True) if mode == "dir" else temporary.unlink(missing_ok=True)
        full = getattr(err, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "(os error 28)" in str(err)
        if full or (isinstance(err, OSError) and not begun):
            raise cannot_write(target, err) from err  # type: ignore[arg-type]
        raise


def _store(path: Path) -> None:
    """Make the disk store what was written to a file, or a folder's list of names (a no-op on Windows)."""
    if os.name != "nt":
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class _Gunzip(gzip.GzipFile):
    """A gzip file whose damage becomes an `InputError`."""

    def readinto(self, buffer: Any) -> int:
        try:
            return super().readinto(buffer)
        except (EOFError, gzip.BadGzipFile, zlib.error) as err:
            raise InputError(f"{self.name}: not a whole gzip file ({err}); copy or download it again") from err


def open_text(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a text file, or a gzip file of one (its name ends in .gz), as a buffered stream of its bytes.

    Raises `InputError` if it is missing, empty, damaged, or by its first bytes no UTF-8 text."""
    try:
        file = _Gunzip(path) if Path(path).suffix == ".gz" else open(path, "rb", buffering=0)
    except OSError as err:
        raise InputError(f"{path}: cannot read ({err.strerror}); give the path of a .txt or .txt.gz file") from err
    stream = io.BufferedReader(file, buffer_size=1 << 20)  # type: ignore[type-var]
    begin = stream.peek(1 << 12)[: 1 << 12]
    zeros, wrong = begin.count(0), "\ufffd" in begin.decode("utf-8", "replace")[:-1]  # its last character may be cut
    if not begin:
        fault = "the file is empty; expected text"
    elif zeros > len(begin) // 100 or (zeros and wrong):  # alone, either is read as it is
        fault = "no text; perhaps a gzip file (its name must end in .gz) or UTF-16; expected UTF-8"
    else:
        return stream
    stream.close()
    raise InputError(f"{path}: {fault}")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; whatever is wrong with it becomes an `InputError`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        why = getattr(err, "strerror", None) or err
        raise InputError(f"{path}: cannot read ({why}); expected a whole JSON file: make or copy it again") from err


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 of a file's bytes as they lie on the disk, in 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def noted_signals() -> Iterator[list[int]]:  # fills when a signal comes
    """Note the first SIGINT or SIGTERM, so that work can end in order; a second one quits at once.

    Only the main thread hears signals; elsewhere nothing is noted."""
    noted: list[int] = []
    with ExitStack() as old:

        def note(signum: int, frame: Any) -> None:
            old.close()
            noted.append(signum)
            say("finishing this step and saving; once more to quit at once")

        with suppress(ValueError):  # elsewhere than in the main thread
            for signum in (signal.SIGINT, signal.SIGTERM):
                old.callback(signal.signal, signum, signal.signal(signum, note))
        yield noted
