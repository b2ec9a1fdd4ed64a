"""What the operations need of the machine: tools and a cache that is the user's own, or one line that says so."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from planlm.errors import MachineError
from planlm.kernels import backend, cpp, environment
from planlm.pretrained import names as model_names

from .test_cpp import SMALL, build


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Sources that compile in seconds."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "small.cpp").write_text(SMALL)
    return folder


def programs(folder: Path, *names: str) -> str:
    """A folder that holds these programs and no other."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text("#!/bin/sh\nexit 0\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_the_installed_ninja_need_not_be_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ninja

    monkeypatch.setenv("PATH", programs(tmp_path / "none"))
    assert environment.ninja() == str(Path(ninja.BIN_DIR) / "ninja")
    monkeypatch.setattr(ninja, "BIN_DIR", str(tmp_path / "gone"))
    assert environment.ninja() is None
    monkeypatch.setenv("PATH", programs(tmp_path / "system", "ninja"))
    assert environment.ninja() == str(tmp_path / "system" / "ninja")
    monkeypatch.setitem(sys.modules, "ninja", None)  # not installed
    assert environment.ninja() == str(tmp_path / "system" / "ninja")


def test_any_usual_compiler_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    for number, names in enumerate([("c++", "g++"), ("g++", "clang++"), ("clang++",)]):
        monkeypatch.setenv("PATH", programs(tmp_path / str(number), *names))
        assert environment.compiler() == names[0]
        assert environment.compiler_program() == str(tmp_path / str(number) / names[0])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.compiler() == "c++" and environment.compiler_program() is None


def test_a_build_needs_no_path_and_no_umask(small: Path, tmp_path: Path) -> None:
    tools, cache = tmp_path / "tools", tmp_path / "cache"
    tools.mkdir()
    for name in ("as", "ld", "which"):  # what g++ calls
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    (tools / "g++").symlink_to(shutil.which(os.environ.get("CXX", "c++")) or "")
    umask = os.umask(0o002)
    try:
        out, err = build(small, cache, PATH=str(tools)).communicate()
    finally:
        os.umask(umask)
    assert out == "None\n", err
    (library,) = (cache / "operators").glob("*.so")
    assert not library.stat().st_mode & 0o022 and not library.parent.stat().st_mode & 0o022


@pytest.mark.parametrize(
    ("names", "compiler", "reason"),
    [
        (("gcc",), None, None),
        (("clang",), None, None),
        (("cc",), None, "Triton has no C compiler: install gcc or set CC"),
        ((), None, "Triton has no C compiler: install gcc or set CC"),
        (("mine",), "mine", None),
        (("gcc",), "mine", "Triton's C compiler (CC=mine) is not there: install it or unset CC"),
    ],
    ids=str,
)
def test_tritons_compiler_is_looked_for_first(
    names: tuple[str, ...], compiler: str | None, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", *names))
    monkeypatch.delenv("CC", raising=False)
    if compiler is not None:
        monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(environment.sysconfig, "get_paths", lambda _: {"include": str(tmp_path)})
    (tmp_path / "Python.h").write_text("")
    assert environment.no_launchers() == reason
    (tmp_path / "Python.h").unlink()
    assert environment.no_launchers() == reason or "has no Python.h in" in str(environment.no_launchers())


def test_a_gpu_without_a_c_compiler_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(backend, "_register_triton", lambda device: pytest.fail("nothing is to be launched"))
    backend._find_triton.cache_clear()
    for _ in range(3):
        assert backend.choose("add_plan", torch.device("cuda"), torch.float32) is None
    backend._find_triton.cache_clear()
    assert [record.message for record in caplog.records] == [
        "planlm.kernels: Triton has no C compiler: install gcc or set CC; the eager reference runs instead"
    ]


def test_tritons_cache_has_to_be_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(environment, "no_launchers", lambda: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert backend._triton_lacks("cuda", 0) is None
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert "set TRITON_CACHE_DIR to a folder of yours" in str(backend._triton_lacks("cuda", 0))


@pytest.fixture
def library(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library in a cache of its own, as a build leaves it."""

    def compile_(sources: list[Path], made: Path) -> None:
        made.write_bytes(b"code")
        made.with_suffix(".sha256").write_text(hashlib.sha256(b"code").hexdigest())

    monkeypatch.setattr(cpp, "SOURCES", small)
    monkeypatch.setattr(cpp, "_compile", compile_)
    monkeypatch.setenv("PLANLM_CACHE", str(tmp_path / "above" / "cache"))
    return cpp._library()


@pytest.mark.parametrize("there", [True, False], ids=["load", "build"])
@pytest.mark.parametrize(
    ("mode", "of", "reason"),
    [
        (0o755, "cache/operators", None),
        (0o775, "cache/operators", "others may write"),
        (0o757, "cache/operators", "others may write"),
        (0o1777, "cache/operators", "others may write"),
        (0o777, "cache", "everybody may write"),
        (0o1777, "cache", None),
        (0o777, ".", "everybody may write"),
    ],
    ids=str,
)
def test_only_what_nobody_else_can_write_is_loaded(
    mode: int, of: str, reason: str | None, there: bool, library: Path, tmp_path: Path
) -> None:
    if not there:
        library.unlink()
    (tmp_path / "above" / of).chmod(mode)
    if reason is None:
        assert cpp._library() == library
        return
    with pytest.raises(
        cpp.Unavailable, match=f"not loaded from .*, where others may put code .*{reason}.*: set PLANLM_C"
    ):
        cpp._library()
    assert library.exists() == there, "nothing is built there either"


def test_a_library_that_others_can_write_is_not_loaded(library: Path) -> None:
    library.chmod(0o777)
    with pytest.raises(cpp.Unavailable, match=f"others may write {library}; chmod go-w mends that"):
        cpp._library()
    library.chmod(0o755)
    assert cpp._library() == library


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_cache_of_another_user_is_not_loaded_by_root(library: Path, tmp_path: Path) -> None:
    for place in (library, library.parent, tmp_path / "above" / "cache", tmp_path / "above"):
        os.chown(place, 12345, -1)
        with pytest.raises(cpp.Unavailable, match=f"{place} belongs to user 12345.*set PLANLM_CACHE"):
            cpp._library()
        os.chown(place, 0, -1)
    assert cpp._library() == library


def test_a_link_is_judged_by_where_it_leads(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "above" / "cache")
    monkeypatch.setenv("PLANLM_CACHE", str(tmp_path / "link"))
    assert cpp._library().resolve() == library
    (tmp_path / "above").chmod(0o777)
    with pytest.raises(cpp.Unavailable, match="everybody may write"):
        cpp._library()


def test_there_is_one_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "~/kept", str(tmp_path / "kept")):
        monkeypatch.setenv("PLANLM_CACHE", given)
        assert environment.cache() == model_names.cache_folder() == tmp_path / ("kept" if given else ".cache/planlm")


def test_without_a_home_the_cache_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(MachineError, match="no home directory for the cache: set PLANLM_CACHE"):
        model_names.cache_folder()
    with pytest.raises(cpp.Unavailable, match="set PLANLM_CACHE"):
        cpp._library()


def test_weights_that_others_may_put_there_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANLM_CACHE", str(tmp_path / "cache"))
    gguf = Path("SmolLM2-135M-Instruct.Q4_1.gguf")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(MachineError, match=r"others may put weights there .*; set PLANLM_CACHE"):
        model_names._converted("HuggingFaceTB/SmolLM2-135M-Instruct", gguf)
    monkeypatch.setenv("PLANLM_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"cannot be converted into .*; set PLANLM_CACHE"):
        model_names._converted("HuggingFaceTB/SmolLM2-135M-Instruct", gguf)


def without_home(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python as a user id that has no entry in the system's list and no HOME."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")
    }
    return subprocess.run(
        ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", sys.executable, *arguments],
        env=kept | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="only root can become any user id")
def test_a_user_id_without_a_home_gets_one(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(parent.stat().st_mode | 0o055)
    room = tmp_path / "tmp"
    room.mkdir()
    room.chmod(0o1777)
    code = """
import getpass, pathlib
from planlm.home import ensure_home

ensure_home()
print(getpass.getuser(), pathlib.Path.home())
"""
    done = without_home("-c", code, TMPDIR=str(room))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"user-54321 {room}/planlm-54321\n"
    assert done.stderr.count("\n") == 1 and "set HOME to choose one" in done.stderr
    assert (room / "planlm-54321").stat().st_mode & 0o777 == 0o700
    (room / "planlm-54321").rmdir()
    (room / "planlm-54321").mkdir()  # somebody else's
    done = without_home("-c", code, TMPDIR=str(room))
    assert done.returncode == 0 and f"{room}/planlm-" in done.stdout and "planlm-54321\n" not in done.stdout, (
        done.stderr
    )
