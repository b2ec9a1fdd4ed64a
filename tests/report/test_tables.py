"""Tables for a terminal."""

from planlm.report.tables import format_planner, format_rows

RESULT = {
    "split": "test", "window": 1024, "stride": 1024, "tokens": 123456, "documents": 97, "versus": "fixed",
    "rows": [
        {"plan": "none", "nll": 3.75936, "perplexity": 42.92, "delta": 0.0847, "ci95": [0.0801, 0.0893],
         "verdict": "worse", "tokens": 123456, "documents": 97},
        {"plan": "fixed", "nll": 3.67453, "perplexity": 39.43, "delta": 0.0, "ci95": None, "verdict": "reference",
         "tokens": 123456, "documents": 97},
        {"plan": "soft, planner frozen", "nll": 3.6734, "perplexity": 39.386, "delta": -0.0012,
         "ci95": [-0.002, 0.0004], "verdict": "no measurable difference", "tokens": 123456, "documents": 97},
    ],
}  # fmt: skip

TABLE = """\
Perplexity on the test split: 97 documents, 123,456 tokens, window 1024, stride
1024.
Differences: nats per token against fixed, with paired 95 % intervals over
documents.

plan                  perplexity  difference       95 % interval  verdict
none                       42.92     +0.0847  [+0.0801, +0.0893]  worse
fixed                      39.43           0                   –  reference
soft, planner frozen       39.39     −0.0012  [−0.0020, +0.0004]  not measurable"""

PLANNER_TABLE = """\
Planner: next action of 256, over 1 sentence

accuracy@1  0.2780
NLL (nats)  3.1800"""


def test_rows():
    assert format_rows(RESULT) == TABLE
    assert max(map(len, TABLE.splitlines())) <= 80


def test_planner():
    planner = {"nll": 3.18, "accuracy@1": 0.278, "sentences": 1, "num_actions": 256}
    assert format_planner(planner) == PLANNER_TABLE
