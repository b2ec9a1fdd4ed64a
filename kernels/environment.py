"""The environment variables that the operations read, all of them; docs/install.md says what they mean.

Triton and torch read more: `TRITON_INTERPRET` runs Triton's kernels on CPU tensors, for tests, and the C++ operators
follow `ATEN_CPU_CAPABILITY`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import stat
import sysconfig
from pathlib import Path


def backend() -> str | None:
    """The backend that the user forces for the process."""
    return os.environ.get("PLANLM_BACKEND") or None


def cache() -> Path:
    """The folder for what is made once and used again.

    Raises:
        RuntimeError: there is no home directory, and PLANLM_CACHE does not name a folder without one.
    """
    try:
        return Path(os.environ.get("PLANLM_CACHE") or "~/.cache/planlm").expanduser()
    except RuntimeError:
        raise RuntimeError("there is no home directory for the cache: set PLANLM_CACHE to a folder") from None


def not_ours(path: Path) -> str | None:
    """Why somebody else may have put there what lies at `path`; None where only this user and root can have.

    Asked before code is loaded from there. Much as ssh does it: this user or root owns it and every folder above it,
    nobody else may write it, and of the folders above what everybody may write has the sticky bit.
    """
    path = path.resolve()
    for place in (path, *path.parents):
        try:
            found = place.stat()
        except OSError:  # to be made, by this user
            continue
        if found.st_uid not in (0, os.getuid()):
            return f"{place} belongs to user {found.st_uid}"
        if place == path and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others may write {place}; chmod go-w mends that"
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            return f"everybody may write {place}"
    return None


def tune() -> bool:
    """Whether the fastest of several ways may be found by measuring, on a CUDA device; not with PLANLM_TUNE=0."""
    return os.environ.get("PLANLM_TUNE") != "0"


def interpreted() -> bool:
    """Whether Triton runs in its interpreter; it looks once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def compiler() -> str:
    """The C++ compiler's command."""
    found = (name for name in ("c++", "g++", "clang++") if shutil.which(name))
    return os.environ.get("CXX") or next(found, "c++")


def compiler_program(default: str | None = None) -> str | None:
    """Where the program is that this command begins with, or None; torch takes an empty `CXX` for a command, too.

    Args:
        default: what is called where `CXX` is not set; default: `compiler()`.
    """
    try:
        command = shlex.split(os.environ.get("CXX", default or compiler()))
    except ValueError:  # a quotation that does not end
        return None
    return shutil.which(command[0]) if command else None


def ninja() -> str | None:
    """Where ninja is: the installed package's own program, which need not be on the path, or the path's."""
    with contextlib.suppress(ImportError, FileNotFoundError):  # not installed; installed without its program
        from ninja import BIN_DIR

        if found := shutil.which("ninja", path=BIN_DIR):
            return found
    return shutil.which("ninja")


def no_launchers() -> str | None:
    """What Triton lacks to make the launchers of its kernels, in C, at their first use; None where it can.

    What triton/runtime/build.py looks for, which raises in the middle of a call where it does not find it.
    """
    wanted = os.environ.get("CC")
    if wanted is None and not (shutil.which("gcc") or shutil.which("clang")):
        return "Triton has no C compiler: install gcc or set CC"
    if wanted is not None and not shutil.which(wanted):
        return f"Triton's C compiler (CC={wanted}) is not there: install it or unset CC"
    scheme = sysconfig.get_default_scheme()
    headers = Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
    if not (headers / "Python.h").exists():
        return f"Triton's C compiler has no Python.h in {headers}: install Python's headers (python3-dev)"
    return None
