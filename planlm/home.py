"""What processes are started with: a home directory and a name for a user id that the system does not know, a path."""

from __future__ import annotations

import contextlib
import getpass
import os
import stat
import sys
import tempfile
from pathlib import Path

from planlm.ranks import rank
from planlm.terminal import note


def python_module(name: str) -> list[str]:
    """The command that runs a module in a process of its own.

    The working folder is on its path only if it is on ours: a file there may be called like a library.
    """
    own = {os.path.realpath(place or os.curdir) for place in sys.path}
    return [sys.executable, *([] if os.path.realpath(os.curdir) in own else ["-P"]), "-m", name]


def ensure_home() -> None:
    """See to it that `~` and the user's name can be found, for this process and those that it starts.

    Libraries keep caches under either; without, they fail or write into a folder that is called `~`. One line says
    which folder stands in: one in the system's temporary folder that only this user can read or write.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user-{os.getuid()}"
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)  # an empty one is none
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = home = _stand_in()
        if rank() == 0:
            note(
                f"planlm: user id {os.getuid()} has no home directory: {home} stands in for it; set HOME to choose one"
            )


def _stand_in() -> str:
    folder = Path(tempfile.gettempdir()) / f"planlm-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        return tempfile.mkdtemp(prefix="planlm-")  # somebody else has made that one
    return str(folder)
