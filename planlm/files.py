"""Writing files and folders that are never seen half-written, and only where they belong.

What is new is made beside its place under a name that nobody can foresee, and renamed when all of it is on the disk.
Who works on such a temporary holds it locked; those of killed processes are unlocked, and go with the next writing in
the same folder. Modes follow the umask, also where a library writes for its own user alone.

A path that the user names is written as a shell would: links are followed, and a device or pipe is written to. A folder
of ours (a run, a corpus) may come from anybody: `within` refuses every link that leads out of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from planlm.errors import InputError

_LEFT = re.compile(r"\.planlm-[0-9a-f]{12}\.partial")

_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC


@contextlib.contextmanager
def replacing(path: Path, within: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when all of it is on the disk, and goes away on any failure.

    Args:
        path: what to write. A link stays, and what it leads to is replaced; a device, a pipe, or a descriptor such as
            /dev/stdout is written to as it is.
        within: the folder that the file belongs to, where that is one of ours.

    Raises:
        InputError: a link in a circle; with `within`, one that leads out of it, or a device or pipe.
        OSError: names `path`, never the temporary.
    """
    target = belonging(path, within)
    if (through := _special(path, target)) is not None:
        with open(through, "wb") as file:
            yield file
        return

    def make(beside: Path) -> int:
        return os.open(beside, _FILE | os.O_CREAT | os.O_EXCL, 0o666)

    with _beside(path, target.parent, make) as (beside, descriptor):
        with open(descriptor, "w+b", closefd=False) as made:
            yield made
        os.fsync(descriptor)
        beside.replace(target)


@contextlib.contextmanager
def replacing_folder(path: Path, within: Path | None = None) -> Iterator[Path]:
    """A folder to fill that takes the place of `path` when all of it is on the disk, and goes away on any failure.

    Its parents are made. Arguments and errors as of `replacing`.
    """
    target = belonging(path, within)
    target.parent.mkdir(parents=True, exist_ok=True)

    def make(beside: Path) -> int:
        beside.mkdir()
        return os.open(beside, _FOLDER)

    with _beside(path, target.parent, make) as (beside, _):
        yield beside
        _settle(beside)
        _move(beside, target)
        _flush(target.parent)


@contextlib.contextmanager
def appending(path: Path, within: Path | None = None) -> Iterator[IO[str]]:
    """A text file to write at the end of `path`, in UTF-8. Arguments and errors as of `replacing`."""
    target = belonging(path, within)
    through = _special(path, target)
    with open(target if through is None else through, "a", encoding="utf-8") as file:
        yield file


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines to a file to which other processes may append at the same time: none is torn by another's.

    A half line at its end, as a killed process leaves, stays a line of its own. Errors as of `replacing`.
    """
    text = "".join(f"{line}\n" for line in lines)
    with appending(path) as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            with contextlib.suppress(OSError):  # where the file system knows no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _ends_line(path):
                file.write("\n")
        file.write(text)


def _ends_line(path: Path) -> bool:
    """Whether a file is empty, or ends with a line break."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file `path`, made if need be, which then says by what process; the lock dies with its owner.

    Where the file system knows no locks a line on stderr says so.

    Raises:
        BlockingIOError: another process holds it; `strerror` says which one, where that is known.
        InputError: it is no file.
        OSError: it cannot be made, or is a link.
    """
    descriptor = os.open(path, os.O_CREAT | _FILE, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{path}: not a file; delete it")
        try:
            _lock(descriptor)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, _owner(os.read(descriptor, 300)), str(path)) from None
        except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP and others
            print(f"{path}: this file system knows no locks; see to it that one command works here", file=sys.stderr)
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _owner(content: bytes) -> str:
    found = re.fullmatch(rb"(\d{1,20}) ([\w.-]{1,255})\n", content)
    return f"process {found[1].decode()} on {found[2].decode()}" if found else "another process"


def write_text(path: Path, text: str, within: Path | None = None) -> None:
    """Replace a file at once: whoever reads it sees the old or the new text, never half of one."""
    with replacing(path, within) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, content: Any, within: Path | None = None) -> None:
    """Replace a file by a JSON value, the same bytes for the same value. Arguments and errors as of `replacing`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", within)


def belonging(path: Path, within: Path | None) -> Path:
    """Where `path` leads once all links are followed.

    Raises:
        InputError: links in a circle; with `within`, out of this folder, or neither to a regular file nor a folder.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise InputError(f"{path}: a link that leads in a circle; delete it")
    if within is None:
        return target
    if not target.is_relative_to(os.path.realpath(within)):
        raise InputError(f"{path}: a link out of {within}, to {target}; delete the link")
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise InputError(f"{path}: neither a file nor a folder; delete it")
    return target


def check_own(folder: Path) -> None:
    """Refuse to work in a folder that may come from elsewhere and in which something leads out of it.

    Raises:
        InputError: names the first link out of `folder`, or device, or pipe.
    """
    for where, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            belonging(Path(where, name), folder)


@contextlib.contextmanager
def beside_result(path: Path) -> Iterator[None]:
    """Write a file that only keeps what the caller returns as well: a failure is a line on stderr, and no error."""
    try:
        yield
    except (OSError, InputError) as error:
        reason = getattr(error, "strerror", None) or error
        print(f"planlm: warning: {path} could not be written ({reason}); the result is complete", file=sys.stderr)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: it is not a file, not JSON in UTF-8, nested too deeply, or no object.
    """
    if not path.is_file():  # a pipe would be waited for
        raise InputError(f"{path}: not a file; delete it and make it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise InputError(f"{path}: not valid JSON (nested too deeply); delete it and make it again") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); delete it and make it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}; delete it and make it again")
    return content


def checksum(path: Path) -> str:
    """XXH3 of a file's contents, 128 bits in hexadecimal: finds damage, at 4 GB/s a core."""
    import xxhash

    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]


def to_json(value: Any) -> str:
    """JSON text of a result: paths, dataclasses and arrays as what they hold; null for NaN and infinity."""

    def held(part: Any) -> Any:
        if isinstance(part, os.PathLike):
            return os.fspath(part)
        return part.tolist() if hasattr(part, "tolist") else dataclasses.asdict(part)

    return json.dumps(json.loads(json.dumps(value, default=held), parse_constant=lambda _: None))


def is_utf8(text: str) -> bool:
    """Whether a name or argument from the system can be written as UTF-8 (Python keeps other bytes as surrogates)."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _special(path: Path, target: Path) -> Path | int | None:
    """What to open where `path` is to be written to as it is: a device, a pipe, or one of our descriptors."""
    number = _descriptor(path)
    if number is None:
        return target if target.exists() and not (target.is_file() or target.is_dir()) else None
    try:
        return os.dup(number)  # a file opened anew would be written from its start again
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _descriptor(path: Path) -> int | None:
    """N where `path` leads to this process's /proc/self/fd/N, as /dev/stdout and /dev/fd/N do."""
    for _ in range(40):  # as many links as Linux follows
        folder = Path(os.path.realpath(path.parent))
        if path.name.isdigit() and str(folder) in (f"/proc/{os.getpid()}/fd", "/dev/fd"):
            return int(path.name)
        if not path.is_symlink():
            break
        path = folder / path.readlink()
    return None


@contextlib.contextmanager
def _beside(path: Path, folder: Path, make: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """A temporary in `folder` with a locked descriptor, gone after any failure; errors name `path` in its place."""
    try:
        _sweep(folder)
        beside, descriptor = _locked_new(folder, make)
        try:
            yield beside, descriptor
        except BaseException:
            _delete(beside)
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        name = str(error.filename or "")
        found = _LEFT.search(name)
        if error.errno is not None and (found or not name):
            error.filename, error.filename2 = f"{path}{name[found.end() :] if found else ''}", None
        raise


def _locked_new(folder: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """A temporary, made by `make` and locked before anybody could take it for a left-over."""
    while True:
        beside = _temporary(folder)
        descriptor = make(beside)
        try:
            _lock(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            continue
        except OSError:  # a file system without locks, where nobody sweeps either
            return beside, descriptor
        if beside.exists():
            return beside, descriptor
        os.close(descriptor)


def _temporary(folder: Path) -> Path:
    return folder / f".planlm-{secrets.token_hex(6)}.partial"


def _sweep(folder: Path) -> None:
    """Delete what killed processes left in `folder`: temporaries that nobody holds."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        left = [Path(entry) for entry in entries if _LEFT.fullmatch(entry.name) and not entry.is_symlink()]
        for path in left:
            with contextlib.suppress(OSError):
                descriptor = os.open(path, _FOLDER if path.is_dir() else _FILE)
                try:
                    _lock(descriptor)
                    _delete(path)
                finally:
                    os.close(descriptor)


def _lock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _move(folder: Path, target: Path) -> None:
    """Put a folder in the place of another, or of what another process puts there at the same time."""
    while True:
        before = _temporary(target.parent)
        with contextlib.suppress(FileNotFoundError):
            target.rename(before)  # quicker than deleting it: there is next to no time in which neither is there
        try:
            folder.rename(target)
            return
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
        finally:
            _delete(before)


def share(files: Iterable[Path]) -> None:
    """Let whoever may read or write a folder read or write these files in it: safetensors' are their owner's alone."""
    for file in files:
        file.chmod(stat.S_IMODE(file.stat().st_mode) | (file.parent.stat().st_mode & 0o666))


def _settle(folder: Path) -> None:
    """Give a new folder's files the modes of the umask, which the folder has, and have all of it on the disk."""
    for where, _, files in os.walk(folder):
        share(Path(where, name) for name in files)
        for name in files:
            _flush(Path(where, name))
        _flush(Path(where))


def _flush(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
