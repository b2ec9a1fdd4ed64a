"""The C++ operators for the CPU: compiled at first use, kept in the cache, loaded once per process.

The library is named after a hash of everything that it is made from, so a change of any makes a new one. It is compiled
in a folder of its own under a lock that dies with its owner and then renamed: neither a killed process nor two that
build at once leave half a library.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import environment, operators

logger = logging.getLogger("planlm.kernels")

SOURCES = Path(__file__).resolve().parents[1] / "csrc"

# Contraction into fused multiply-adds is most of the exponential's speed; errno and traps are never looked at.
FLAGS = ("-O3", "-std=c++20", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
}


@functools.cache
def why_not() -> str | None:
    """Load the operators, compiling them first if need be. Returns the reason where that fails, and says it once."""
    operators.define("planlm")
    try:
        _load()
    except Unavailable as problem:
        logger.warning("planlm.kernels: %s; the eager reference runs instead", problem)
        return str(problem)
    return None


class Unavailable(Exception):
    """The operators cannot be had; the message says why and what would help."""


def fast_bf16() -> bool:
    """Whether matrix products of bfloat16 have instructions of their own here; without, float32 is faster."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private: float32 where it is gone
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and supported is not None and supported()


def flags() -> tuple[str, ...]:
    """The compiler's flags, with those of the instruction set that torch has chosen here.

    A library is named after them: one that was built for another processor, or under another ATEN_CPU_CAPABILITY, is
    never loaded.
    """
    instructions = INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())
    return FLAGS + instructions + (("-mavx512bf16",) if fast_bf16() else ())


def _load() -> None:
    library = _library()
    try:
        torch.ops.load_library(library)
    except OSError as problem:
        cause = problem.__cause__ or problem
        raise Unavailable(
            f"the C++ operators cannot be loaded ({str(cause).splitlines()[0]}): delete {library.parent}"
        ) from None


def _library() -> Path:
    """The compiled library, made if it is not there."""
    sources = sorted(path for path in SOURCES.glob("*") if path.suffix in (".cpp", ".h"))
    if not sources:
        raise Unavailable(f"the C++ sources are not in {SOURCES}")
    key = hashlib.sha256()
    made_from = (torch.__version__, torch.version.git_version, platform.machine(), environment.compiler(), *flags())
    for text in (*made_from, *(part for path in sources for part in (path.name, path.read_text()))):
        key.update(text.encode() + b"\0")
    try:
        folder = environment.cache() / "operators"
    except RuntimeError as problem:
        raise Unavailable(f"{problem}, to keep the C++ operators in") from None
    library = folder / f"planlm-{key.hexdigest()[:20]}.so"
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        # A checksum says that the library is whole, not whose it is.
        if (reason := environment.not_ours(folder) or environment.not_ours(library)) is not None:
            raise Unavailable(
                f"the C++ operators are not loaded from {folder}, where others may put code ({reason}): "
                "set PLANLM_CACHE to a folder that only you can write"
            )
        if _is_sound(library):
            return library
        with _lock(folder / "lock"):
            if not _is_sound(library):
                for left in folder.glob("build-*"):  # by a process that was killed: whoever builds holds the lock
                    shutil.rmtree(left, ignore_errors=True)
                _compile([path for path in sources if path.suffix == ".cpp"], library)
    except OSError as problem:
        raise Unavailable(
            f"the C++ operators cannot be kept in {folder} ({problem.strerror}): set PLANLM_CACHE"
        ) from None
    return library


def _is_sound(library: Path) -> bool:
    """Whether the library is there as it was written: loading a torn one would kill the process."""
    digest = library.with_suffix(".sha256")
    return (
        library.exists() and digest.exists() and digest.read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(sources: list[Path], library: Path) -> None:
    if environment.compiler_program() is None:
        raise Unavailable(f"no C++ compiler ({environment.compiler()}) for the C++ operators: install g++ or set CXX")
    # Imported here: it takes a third of a second, and the library is nearly always there.
    from torch.utils import cpp_extension

    ninja = environment.ninja()
    if ninja is None:
        raise Unavailable("no ninja to compile the C++ operators with: pip install ninja")
    logger.warning("planlm.kernels: compiling the C++ operators, once, in under a minute")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as build, _tools(ninja):
        try:
            cpp_extension.load(
                "planlm_operators",
                [str(source) for source in sources],
                build_directory=build,
                extra_cflags=list(flags()),
                extra_ldflags=["-fopenmp"],
                is_python_module=False,
            )
        except (RuntimeError, subprocess.SubprocessError, OSError) as problem:
            raise Unavailable(f"the C++ operators do not compile ({_first_error(str(problem))})") from None
        made = Path(build) / "planlm_operators.so"
        made.chmod(0o755)  # whatever the umask allows others
        digest = made.with_suffix(".sha256")
        digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        os.replace(made, library)
        os.replace(digest, library.with_suffix(".sha256"))
    logger.warning("planlm.kernels: compiled in %.0f s", time.perf_counter() - start)


@contextmanager
def _tools(ninja: str) -> Iterator[None]:
    """What torch's build calls is on the path and in `CXX` for as long as it runs."""
    before = dict(os.environ)
    os.environ["PATH"] = os.pathsep.join([str(Path(ninja).parent), os.environ.get("PATH", os.defpath)])
    os.environ.setdefault("CXX", environment.compiler())
    try:
        yield
    finally:
        for name in ("PATH", "CXX"):
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def _first_error(output: str) -> str:
    """The first line of a build's output that says what is wrong."""
    lines = output.splitlines()
    return next((line for line in lines if "error" in line.lower() and "Error building" not in line), lines[0])
