"""Run transformers' own tests of a model on joint models: `python -m tests.conformance [PYTEST ARGUMENT ...]`.

The tests come from the source distribution of the installed release, which pip fetches once; they are not in this
repository. Those that a joint model cannot pass are listed in docs/ecosystem.md, with the reason. The run fails if any
other one fails, and also if a listed one passes, is skipped or is not there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "ecosystem.md"
PACKAGE = "transformers_tests"
STAND_INS = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
"""Files that the distribution lacks although its tests import them, and the class that an empty one stands in for."""


def fetch(folder: Path) -> bool:
    """Fill `folder`, unless it is there, with transformers' tests as a package and what they import; False where pip
    cannot get them."""
    if folder.is_dir():
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        beside = Path(temporary) / "made"
        release = ["--no-binary", "transformers", f"transformers=={version('transformers')}"]
        if not (
            _pip("download", "--no-deps", "--dest", temporary, *release)
            and _pip("install", "--no-deps", "--target", beside, "parameterized==0.9.0")
        ):
            return False
        with tarfile.open(next(Path(temporary).glob("transformers-*.tar.gz"))) as archive:
            archive.extractall(temporary, filter="data")
        shutil.copytree(next(Path(temporary).glob("transformers-*/tests")), beside / PACKAGE)
        for name, stand_in in STAND_INS.items():
            path = beside / PACKAGE / name
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.write_text(f"class {stand_in}:\n    pass\n")
        beside.rename(folder)
    return True


def _pip(*words: object) -> bool:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, words)]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
    return done.returncode == 0


class Record:
    """pytest plugin: which tests there are, and which of them failed, be it in a part."""

    def __init__(self) -> None:
        self.tests: set[str] = set()
        self.failed: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.tests = {self._name(item.nodeid) for item in session.items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(self._name(report.nodeid))

    def _name(self, node: str) -> str:
        return node.split("::", 1)[-1]  # LlamaTest::test_training


def main(arguments: list[str]) -> int:
    """Run the tests; the exit status."""
    folder = ROOT / "build" / f"transformers-{version('transformers')}"
    if not fetch(folder):
        print("conformance: SKIPPED, pip cannot get the source distribution of transformers", file=sys.stderr)
        return 0
    sys.path.insert(0, str(folder))
    record = Record()
    suite = str(Path(__file__).with_name("suite.py"))
    options = ["-q", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider"]
    status = int(pytest.main([*options, *arguments, suite], plugins=[record]))
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return status
    listed = set(re.findall(r"^\| `(test_\w+)` \|", TABLE.read_text(), re.MULTILINE))
    expected = {test for test in record.tests if test.split("::")[-1] in listed}
    problems = {
        "failed": record.failed - expected,
        f"no longer fail, strike them from {TABLE.name}": expected - record.failed,
        f"listed in {TABLE.name} but not there": set() if arguments else listed - {t.split("::")[-1] for t in expected},
    }
    for what, tests in problems.items():
        if tests:
            print(f"conformance: {what}: {', '.join(sorted(tests))}")
    print(f"conformance: {len(record.tests)} tests, {len(expected)} of them listed as not to be passed")
    return int(any(problems.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
