"""Plots: files that open, elements that belong on a page."""

import math
import re
from xml.etree import ElementTree

import matplotlib.image
import pytest

from planlm.report.plots import breakdown_figure, curves_figure, perplexity_figure, save_png, to_svg
from planlm.report.tables import format_breakdown


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in (*axes.texts, *axes.get_yticklabels())]


def test_png_is_written_whole_and_large_enough_to_read(result, tmp_path):
    save_png(perplexity_figure(result), tmp_path / "perplexity.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "perplexity.png").shape
    assert width > 1000
    assert height > 300
    assert [path.name for path in tmp_path.iterdir()] == ["perplexity.png"]


def test_every_row_is_named_and_its_perplexity_and_difference_stand_beside_it(result):
    shown = texts(perplexity_figure(result))
    for row in result["rows"]:
        assert row["plan"] in shown
        assert any(text.startswith(f"{row['perplexity']:.2f}") for text in shown)


def test_intervals_stand_where_the_numbers_say(result):
    axes = perplexity_figure(result).axes[0]
    reference = next(row for row in result["rows"] if row["plan"] == "fixed")
    hard = next(row for row in result["rows"] if row["plan"] == "hard")
    bars = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    expected = pytest.approx([reference["perplexity"] * math.exp(nats) for nats in hard["ci95"]])
    assert any(list(bar) == expected for bar in bars)


def test_a_far_row_does_not_squash_the_others(result):
    figure = perplexity_figure(result)
    low, high = figure.axes[0].get_xlim()
    perplexity = {row["plan"]: row["perplexity"] for row in result["rows"]}
    assert low < perplexity["soft <joint>"] < perplexity["fixed"] < high < perplexity["none"]
    assert "off the scale" in texts(figure)


@pytest.mark.parametrize("plans", [["fixed"], ["fixed", "none"], ["fixed", "none", "hard"]])
def test_few_rows_are_all_drawn_to_scale_or_marked(result, plans):
    figure = perplexity_figure(result | {"rows": [row for row in result["rows"] if row["plan"] in plans]})
    low, high = figure.axes[0].get_xlim()
    assert low < high
    assert len(plans) > 2 or "off the scale" not in texts(figure)


def test_svg_is_repeatable_and_carries_no_address_and_no_fixed_ink(result):
    svg = to_svg(perplexity_figure(result), "first")
    assert svg == to_svg(perplexity_figure(result), "first")
    assert "http" not in svg
    assert "var(--ink)" in svg
    assert "#1c1c20" not in svg
    assert "soft &lt;joint&gt;" in svg
    ElementTree.fromstring(svg)
    ids = set(re.findall(r'\bid="([^"]+)"', svg))
    assert all(name.startswith("first-") for name in ids)
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg)) <= ids


def test_curves_take_what_was_logged_and_leave_out_the_rest():
    lines = [{"step": i, "lm_loss": 4.0, "planner_loss": None, "planner_entropy": float("nan")} for i in range(8)]
    figure = curves_figure({"a": lines, "b": []})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["LM loss (nats per token)"]
    assert curves_figure({"a": [{"step": 1}]}) is None
    assert curves_figure({}) is None


def test_gains_by_sentence_and_length_are_drawn_where_a_result_has_them(result):
    assert breakdown_figure(result) is None and format_breakdown(result) == ""
    parts = [{"bucket": name, "rows": result["rows"]} for name in ("1", "2", "3-4")]
    figure = breakdown_figure(result | {"by_position": parts, "by_length": parts[:2]})
    first, second = figure.axes
    assert [label.get_text() for label in first.get_xticklabels()] == ["1", "2", "3-4"]
    lines = {line.get_label(): line.get_ydata() for line in second.lines}
    soft = next(row for row in result["rows"] if row["plan"] == "soft <joint>")
    assert list(lines["soft <joint>"]) == [soft["delta"]] * 2 and "fixed" not in lines
    ElementTree.fromstring(to_svg(figure, "parts"))
    rows = format_breakdown(result | {"by_position": parts}).splitlines()
    assert rows[3].split() == ["sentence", "tokens", "none", "uniform", "hard", "soft", "<joint>"]
    assert "(" in rows[4].split()[3] and "(" not in rows[4].split()[-1], "uniform shows no difference"
