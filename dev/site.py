"""The documentation's site in build/site: `python -m dev.site`, a part of `make docs`.

Pages keep their places in the tree, so that links which GitHub follows lead to the same pages here. The navigation is
what docs/README.md lists under its headings.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "docs" / "README.md"
SHOWN = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "docs", "dev/log.md", "examples", "experiments")
"""What the site has: pages, and files that they link to."""


def navigation() -> list[object]:
    """The pages that docs/README.md lists, by its headings.

    Raises:
        SystemExit: a page of docs/ is not listed.
    """
    nav: list[object] = ["README.md", "docs/README.md"]
    listed = {INDEX}
    for part in re.split(r"^## ", INDEX.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        pages = [(INDEX.parent / name).resolve() for name in re.findall(r"^- \[[^]]+\]\(([^)#]+\.md)\)", part, re.M)]
        listed.update(pages)
        if pages:
            nav.append({part.splitlines()[0]: [page.relative_to(ROOT).as_posix() for page in pages]})
    if missing := sorted(str(page.relative_to(ROOT)) for page in {*INDEX.parent.rglob("*.md")} - listed):
        raise SystemExit(f"docs/README.md does not list {', '.join(missing)}: add a line under one of its headings")
    return nav


def build() -> None:
    """Make the site anew.

    Raises:
        SystemExit: a page is not listed.
        CalledProcessError: a link leads nowhere.
    """
    pages = ROOT / "build" / "pages"  # as mkdocs.yml has it
    shutil.rmtree(pages, ignore_errors=True)
    for name in SHOWN:
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, pages / name)
    whole = ROOT / "build" / "mkdocs.yml"
    nav = yaml.safe_dump({"INHERIT": "../mkdocs.yml", "nav": navigation()})
    whole.write_text(nav, encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", whole], check=True
    )


if __name__ == "__main__":
    build()
