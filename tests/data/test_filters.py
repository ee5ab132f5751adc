"""The overlap filter of the pair stage."""

from __future__ import annotations

import pytest

from polyvec.data.filters import overlaps


@pytest.mark.parametrize(
    ("first", "second", "dropped"),
    [
        ("how the router works", "This is How The Router works.", True),
        ("This is How The Router works.", "how the router works", True),  # order of the sides is none
        ("one two three four five", "one two three four", True),
        ("one two three four five", "one two three four six and more", True),  # 4 of 5 words
        ("one two three q z", "one two three four six and more", False),  # 3 of 5
        ("the router works", "the router works", False),  # three words say too little
        ("where does the cat sleep", "It sleeps on a chair by the window.", False),
        ("怎么做土豆鸡蛋饼", "怎么做土豆鸡蛋饼的说明", False),
        ("", "", False),
    ],
)
def test_a_pair_whose_shorter_text_lies_in_the_longer_is_dropped(first: str, second: str, dropped: bool) -> None:
    assert overlaps(first, second) == dropped
