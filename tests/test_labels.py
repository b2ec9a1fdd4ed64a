"""Actions by number or by label."""

from __future__ import annotations

import pytest

from planlm.errors import InputError
from planlm.labels import find_action, show_action

LABELS = ["birth and family", "harbour trade", "", "Harbour Trade "]


@pytest.mark.parametrize("written", ["0", " 00 ", "birth and family", "  Birth AND family\t"])
def test_a_number_and_a_label_name_an_action(written: str) -> None:
    assert find_action(written, 4, LABELS, "--plan") == 0


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("4", "--plan 4: expected an action from 0 to 3"),
        ("-1", "--plan '-1': no action has this label"),
        ("9" * 5000, "expected an action from 0 to 3"),
        ("", "--plan '': no action has this label"),
        ("birth and famly", "--plan 'birth and famly': no action has this label; the closest is 0 .birth and family.$"),
        ("harbour trade", "the label of the actions 1, 3; give one's number"),
    ],
)
def test_what_names_no_action_is_refused(written: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_action(written, 4, LABELS, "--plan")


def test_without_labels_only_numbers_are_taken() -> None:
    with pytest.raises(InputError, match="expected an action from 0 to 3; this model's have no labels"):
        find_action("birth", 4, None, "--ban")


def test_an_action_is_shown_with_its_label() -> None:
    assert [show_action(at, LABELS) for at in (0, 2)] == ["0 (birth and family)", "2"]
    assert show_action(12, None) == "12"
