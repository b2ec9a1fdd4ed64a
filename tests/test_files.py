"""Files appear whole or not at all, with the umask's modes, and nowhere else than where they belong."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from planlm import files
from planlm.errors import InputError


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(path: Path, content: str = "new", within: Path | None = None) -> None:
    with files.replacing_folder(path, within) as folder:
        (folder / "file").write_text(content)


# Whole or not at all


@pytest.mark.parametrize("before", [None, "old"])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path, before: str | None) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    if before:
        file.write_text(before)
        fill(folder, before)

    def fail_in_file() -> None:
        with files.replacing(file) as new:
            new.write(b"half")
            raise ZeroDivisionError

    def fail_in_folder() -> None:
        with files.replacing_folder(folder) as made:
            (made / "file").write_text("half")
            raise ZeroDivisionError

    for fail in (fail_in_file, fail_in_folder):
        with pytest.raises(ZeroDivisionError):
            fail()
    assert names(tmp_path) == (["file", "folder"] if before else [])
    if before:
        assert file.read_text() == (folder / "file").read_text() == before


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    fill(tmp_path / "a" / "folder", "old")
    (tmp_path / "a" / "folder" / "other").touch()
    fill(tmp_path / "a" / "folder")
    assert names(tmp_path / "a") == ["folder"] and names(tmp_path / "a" / "folder") == ["file"]
    assert (tmp_path / "a" / "folder" / "file").read_text() == "new"


def _stall(path: str, is_folder: bool) -> None:
    with files.replacing_folder(Path(path)) if is_folder else files.replacing(Path(path)):
        time.sleep(60)


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_a_killed_process_left_goes_with_the_next_writing_and_what_a_live_one_makes_stays(
    tmp_path: Path, is_folder: bool
) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_stall, args=(str(tmp_path / "a"), is_folder))
    process.start()
    try:
        while not names(tmp_path):
            time.sleep(0.05)
        time.sleep(0.2)  # it is locked at once, but not in the same instant
        (partial,) = names(tmp_path)
        files.write_text(tmp_path / "b", "")
        assert names(tmp_path) == [partial, "b"]
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert names(tmp_path) == [partial, "b"]
    files.write_text(tmp_path / "b", "")
    assert names(tmp_path) == ["b"]


def test_other_files_are_no_left_overs(tmp_path: Path) -> None:
    for name in ("file.partial", ".planlm-x.partial", "b.planlm-0123456789ab.partial"):
        (tmp_path / name).touch()
    (tmp_path / ".planlm-0123456789ab.partial").symlink_to(tmp_path / "file.partial")
    before = names(tmp_path)
    files.write_text(tmp_path / "z", "")
    assert names(tmp_path) == [*before, "z"]


def test_many_writers_at_once_leave_one_whole_text(tmp_path: Path) -> None:
    texts = [str(number) * 5000 for number in range(8)]
    failed = []

    def write(text: str) -> None:
        try:
            for _ in range(20):
                files.write_text(tmp_path / "file", text)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() in texts


# Modes and errors


@pytest.mark.usefixtures("umask")
def test_modes_follow_the_umask(tmp_path: Path) -> None:
    files.write_text(tmp_path / "text", "")
    with files.appending(tmp_path / "lines") as file:
        file.write("x\n")
    with files.replacing_folder(tmp_path / "folder") as folder:
        (folder / "in").mkdir()
        for name in ("private", "in/private"):  # as safetensors writes
            os.close(os.open(folder / name, os.O_CREAT | os.O_WRONLY, 0o600))
    for name in ("text", "lines", "folder/private", "folder/in/private"):
        assert mode(tmp_path / name) == 0o640, name
    assert mode(tmp_path / "folder") == mode(tmp_path / "folder" / "in") == 0o750


def test_errors_name_the_file_and_not_the_temporary(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    for path in (tmp_path / "absent" / "file", tmp_path / "folder"):
        with pytest.raises((FileNotFoundError, IsADirectoryError)) as caught:
            files.write_text(path, "")
        assert (caught.value.filename, caught.value.filename2) == (str(path), None)
    for raised, named in (
        (lambda folder: (folder / "a" / "b").touch(), "new/a/b"),
        (lambda folder: os.write(os.open("/dev/full", os.O_WRONLY), b"x"), "new"),
        (lambda folder: (tmp_path / "other" / "b").touch(), "other/b"),
    ):
        with pytest.raises(OSError, match=r"\[Errno") as caught, files.replacing_folder(tmp_path / "new") as folder:
            raised(folder)
        assert caught.value.filename == str(tmp_path / named)
    with pytest.raises(OSError, match=r"^a library's own words$"), files.replacing_folder(tmp_path / "new"):
        raise OSError("a library's own words")
    assert names(tmp_path) == ["folder"]


# What a user names is written where it leads


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in/second")
    (tmp_path / "in" / "second").symlink_to(tmp_path / "in" / "file")  # which is not there yet
    for text in ("one", "two"):
        files.write_text(tmp_path / "link", text)
        assert (tmp_path / "in" / "file").read_text() == text
    assert (tmp_path / "link").is_symlink() and (tmp_path / "in" / "second").is_symlink()
    (tmp_path / "folder").symlink_to("in/folder")
    fill(tmp_path / "folder")
    assert (tmp_path / "folder").is_symlink() and names(tmp_path / "in" / "folder") == ["file"]


def test_a_link_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop: a link that leads in a circle"):
        files.write_text(tmp_path / "loop", "")


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    files.write_text(tmp_path / "pipe", "through")
    assert reader.communicate(timeout=30)[0] == "through"
    assert names(tmp_path) == ["pipe"] and (tmp_path / "pipe").is_fifo()


def test_a_device_is_written_to(tmp_path: Path) -> None:
    null, full = tmp_path / "null", tmp_path / "full"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        os.mknod(full, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
        null.write_bytes(b"")
    except PermissionError:
        pytest.skip("only root makes devices")
    (tmp_path / "link").symlink_to("null")
    for path in (null, tmp_path / "link"):
        files.write_text(path, "gone")
        with files.appending(path) as file:
            file.write("gone")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        files.write_text(full, "x")
    assert null.is_char_device() and full.is_char_device() and (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["full", "link", "null"]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("is_pipe", [True, False])
def test_a_descriptor_is_written_to_where_it_stands(tmp_path: Path, name: str, is_pipe: bool) -> None:
    code = "import sys; from pathlib import Path; from planlm import files; print('a', flush=True)\n"
    code += f"files.write_text(Path({name!r}), 'b\\n')\nwith files.appending(Path({name!r})) as f: f.write('c\\n')\n"
    code += "print('d')"
    with (tmp_path / "out").open("w") as out:
        kind = subprocess.PIPE if is_pipe else out
        done = subprocess.run([sys.executable, "-c", code], stdout=kind, check=True, text=True)
    assert (done.stdout if is_pipe else (tmp_path / "out").read_text()) == "a\nb\nc\nd\n"
    assert names(tmp_path) == ["out"]


def test_a_descriptor_that_is_closed_is_named() -> None:
    with pytest.raises(OSError, match="/dev/fd/77"):
        files.write_text(Path("/dev/fd/77"), "")


# A folder of ours is not left


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of ours, reached through a link as users may; `outside` beside it must stay as it is."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("precious")
    (tmp_path / "real").mkdir()
    (tmp_path / "own").symlink_to("real")
    return tmp_path / "own"


@pytest.mark.parametrize("target", ["../outside/file", "../outside/absent", "../outside", "/dev/null"])
def test_a_link_out_of_the_folder_is_refused(own: Path, target: str) -> None:
    (own / "link").symlink_to(target)

    def append() -> None:
        with files.appending(own / "link", own) as file:
            file.write("x")

    for write in (
        append,
        lambda: files.write_text(own / "link", "x", own),
        lambda: fill(own / "link", within=own),
        lambda: files.check_own(own),
    ):
        with pytest.raises(InputError, match=r"own/link: a link out of .*/own, to .*; delete the link"):
            write()
    assert names(own) == ["link"]
    assert names(own.parent / "outside") == ["file"]
    assert (own.parent / "outside" / "file").read_text() == "precious"


def test_a_link_among_the_parents_is_refused(own: Path) -> None:
    (own / "in").symlink_to("../outside")
    for path in (own / "in" / "file", own / "in" / "new" / "er"):
        with pytest.raises(InputError, match="a link out of"):
            files.write_text(path, "x", own)
        with pytest.raises(InputError, match="a link out of"):
            fill(path, within=own)
    assert names(own.parent / "outside") == ["file"]


def test_links_within_the_folder_are_followed(own: Path) -> None:
    (own / "link").symlink_to("file")
    files.write_text(own / "link", "x", own)
    files.check_own(own)
    assert names(own) == ["file", "link"] and (own / "link").is_symlink()


def test_a_pipe_in_the_folder_is_refused_and_not_waited_for(own: Path) -> None:
    os.mkfifo(own / "pipe")
    for write in (lambda: files.write_text(own / "pipe", "x", own), lambda: files.check_own(own)):
        with pytest.raises(InputError, match="pipe: neither a file nor a folder"):
            write()


def test_a_lock_is_held_once_and_never_through_a_link(own: Path) -> None:
    with files.locked(own / "lock"), pytest.raises(BlockingIOError), files.locked(own / "lock"):
        pass
    with files.locked(own / "lock"):
        pass
    (own / "link").symlink_to("../outside/file")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)), files.locked(own / "link"):
        pass
    assert (own.parent / "outside" / "file").read_text() == "precious"


OWNER = """
import sys
from pathlib import Path
from planlm import files
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_says_whose_it_is_and_ends_with_its_owner(own: Path) -> None:
    path = own / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError) as held, files.locked(path):
            pass
        assert held.value.strerror == f"process {owner.pid} on {socket.gethostname()}"
        owner.send_signal(signal.SIGKILL)
    with files.locked(path):
        assert path.read_text() == f"{os.getpid()} {socket.gethostname()}\n"
        path.write_text("1 \x1b[31mroot\n" * 100)
        with pytest.raises(BlockingIOError, match="another process"), files.locked(path):
            pass


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "link", "dangling"])
def test_a_planted_lock_is_refused_and_not_followed(kind: str, own: Path) -> None:
    path = own / "lock"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as here:
            here.bind(str(path))
    else:
        path.symlink_to("../outside/file" if kind == "link" else "../outside/new")
    with pytest.raises((OSError, InputError), match="lock"), files.locked(path):
        pass
    assert names(own.parent / "outside") == ["file"] and (own.parent / "outside" / "file").read_text() == "precious"
    with files.locked(own / "another"):
        assert mode(own / "another") == 0o640


def test_where_there_are_no_locks_it_is_said(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with files.locked(own / "lock"):
        assert "lock: this file system knows no locks" in capsys.readouterr().err
