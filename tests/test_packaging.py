"""Pins that can be installed together, and archives that hold what they should."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, TOOLS = PYPROJECT["project"], PYPROJECT["tool"]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}

# What torch's CUDA wheels for Linux require, in their own words: `triton==...`. A CPU build does not say.
TRITON_OF_TORCH = {"2.13.0": "3.7.1"}


def test_triton_is_the_release_that_torch_names() -> None:
    assert PINS["triton"] == TRITON_OF_TORCH[PINS["torch"]]
    for requirement in map(Requirement, importlib.metadata.requires("torch") or []):
        pinned = PINS.get(canonicalize_name(requirement.name))
        if pinned is not None and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            assert requirement.specifier.contains(pinned), f"torch requires {requirement}, and {pinned} is pinned"


def test_pins_lie_in_the_supported_ranges() -> None:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    wanted = [Requirement(line) for line in PROJECT["dependencies"] + extras]
    outside = [
        f"{requirement} and {PINS[canonicalize_name(requirement.name)]}"
        for requirement in wanted
        if canonicalize_name(requirement.name) in PINS
        and not requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])
    ]
    assert not outside
    torch = next(requirement for requirement in wanted if requirement.name == "torch")
    tried = Version(PINS["torch"])
    assert not torch.specifier.contains(f"{tried.major}.{tried.minor + 1}.0"), "a release that no test has run with"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist and a wheel that was made from it, by the build backend itself: no network."""
    if Version(pytest.importorskip("setuptools").__version__) < Version("77"):
        pytest.skip("setuptools is older than the project asks for")
    folder = tmp_path_factory.mktemp("archives")
    for name in ("planlm", "kernels", "csrc", "tests", "docs", "benchmarks", "dev", "examples", "experiments"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder / "tree")
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"

    def make(what: str, tree: Path) -> None:
        command = [sys.executable, "-c", build, what, str(folder)]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    make("build_sdist", folder / "tree")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    make("build_wheel", next((folder / "unpacked").iterdir()))
    return folder


def files(*patterns: str) -> set[str]:
    found = {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    return {name for name in found if "__pycache__" not in name}


def test_a_source_archive_can_be_tested_and_read(archives: Path) -> None:
    (sdist,) = archives.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = files("*.md", "*.toml", "LICENSE", "Makefile", "constraints.txt", "tests/**/*.py", "docs/**/*", "dev/*")
    wanted |= files(
        "experiments/*", "benchmarks/**/*.py", "csrc/*", "kernels/*.py", "planlm/**/*.py", "planlm/**/*.html"
    )
    assert {"tests/conftest.py", "docs/method.md", "constraints.txt"} <= wanted
    assert not wanted - held


def test_a_wheel_holds_every_module_and_the_sources_of_the_operators(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        metadata = next(name for name in held if name.endswith(".dist-info/METADATA"))
        described = archive.read(metadata).decode()
    wanted = files("planlm/**/*.py", "planlm/**/*.html", "planlm/py.typed")
    wanted |= {f"planlm/{name}" for name in files("kernels/*.py", "csrc/*")}
    assert not wanted - held
    assert all(name.startswith(("planlm/", "planlm-")) for name in held), "one package at the top, and no tests"
    for minor in (11, 12, 13):
        assert f"Classifier: Programming Language :: Python :: 3.{minor}\n" in described


DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", "")


def test_the_image_has_the_tested_versions_and_what_they_need() -> None:
    base = re.findall(r"^FROM python:(3\.\d+)-slim", DOCKERFILE, re.MULTILINE)
    assert len(base) == 1 and f"Programming Language :: Python :: {base[0]}" in PROJECT["classifiers"]
    installed = re.findall(r"^RUN pip install (.+)$", DOCKERFILE, re.MULTILINE)
    assert len(installed) == 2 and all("--constraint constraints.txt" in line for line in installed)
    (extras,) = re.findall(r'"\.\[(.+)\]"', DOCKERFILE)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert "g++" in DOCKERFILE, "Triton and the C++ operators compile at first use"
    user = re.findall(r"^USER (\w+)$", DOCKERFILE, re.MULTILINE)
    assert user and user[-1] != "root"
    assert re.search(r'^ENTRYPOINT \["planlm"\]\nCMD \["doctor"\]$', DOCKERFILE, re.MULTILINE)


def test_the_image_is_made_of_all_that_a_wheel_is_made_of() -> None:
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()}
    assert all((ROOT / name).exists() for name in copied)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == copied
    rooms = TOOLS["setuptools"]["package-dir"].values()
    assert {*rooms, "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= copied
