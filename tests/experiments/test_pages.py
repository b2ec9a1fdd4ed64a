"""Which rows the figures of an experiment show."""

from __future__ import annotations

from typing import Any

from planlm.experiments.pages import MOST_LINES, _compared


def row(name: str, *plans: str, reference: bool = False) -> dict[str, Any]:
    return {"label": name.upper(), "plans": {plan: {"is_reference": reference} for plan in plans}}


def test_the_reference_takes_no_line_from_a_row_that_is_drawn() -> None:
    names = [f"row{number}" for number in range(MOST_LINES)]
    rows = {"fixed": row("fixed", "fixed", reference=True), "joint": row("joint", "soft", "shuffled")}
    rows |= {name: row(name, "hard") for name in names}
    compare = [{"row": "joint", "versus": name} for name in ("fixed", *names)]
    assert _compared({"rows": rows, "compare": compare}) == ["JOINT / soft", *map(str.upper, names[:-1])]
    assert _compared({"rows": rows, "compare": [{"row": "joint/shuffled", "versus": "gone"}]}) == ["JOINT / shuffled"]
    assert _compared({"rows": rows, "compare": []})[:2] == ["JOINT / soft", "ROW0"]
