"""The summary of what the compiler made of the kernels."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the report is of Triton's compiler")

from benchmarks.compile_report import Compilation, page, summary

GOOD = Compilation("plain", "product_kernel", 80, "float32", "64x64x32", 100, 0, 4096, 8, has_product=True)
SPILLS = Compilation("plain", "product_kernel", 90, "float32", "64x64x32", 255, 16, 4096, 2, has_product=True)
SUM = Compilation("gate", "sum_kernel", 80, "float32", "16x64x0", 40, 0, 512, 0, has_product=False)


def test_the_summary_has_a_line_for_each_architecture_and_one_for_each_violation() -> None:
    found = [GOOD, SPILLS, SUM]
    text = summary(found, [line for one in found for line in one.violations()])
    assert "| 80 | 2 | 2 | 100 | 0 | 4096 | 8 | 0 |" in text
    assert "| 90 | 1 | 1 | 255 | 16 | 4096 | 2 | 1 |" in text
    assert "- product_kernel sm_90 float32 64x64x32 (plain): spills 16 bytes" in text
    assert "No violation." in summary([GOOD, SUM], [])


def test_the_page_has_every_compilation() -> None:
    assert "| sum_kernel | 80 | float32 | gate | 16x64x0 | 40 | 0 | 512 | no product |" in page([GOOD, SPILLS, SUM])
