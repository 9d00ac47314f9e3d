"""Layouts cover their sequence exactly and say why when they do not."""

import pytest

from linearize.attention.layout import Segment, TokenLayout, grid_segment


def test_spans_follow_each_other():
    layout = TokenLayout.of(
        (Segment("register", 4), Segment("text", 7), grid_segment("main", 2, 3, 5), Segment("reference", 6))
    )
    assert [(span.start, span.stop, span.segment.role) for span in layout.spans] == [
        (0, 4, "register"),
        (4, 11, "text"),
        (11, 41, "main"),
        (41, 47, "reference"),
    ]
    assert layout.num_tokens == 47
    assert layout.num_global == 17
    assert layout.global_ranges == ((0, 11), (41, 47))
    assert layout.grids == ((11, (2, 3, 5)),)


def test_several_grids_in_any_order():
    layout = TokenLayout.of((grid_segment("main", 1, 2, 2), Segment("text", 3), grid_segment("reference", 1, 1, 5)))
    assert layout.grids == ((0, (1, 2, 2)), (7, (1, 1, 5)))
    assert layout.global_ranges == ((4, 7),)


def test_empty_segments_are_left_out():
    assert TokenLayout.of((Segment("text", 0), grid_segment("main", 1, 1, 1))).segments == (
        grid_segment("main", 1, 1, 1),
    )


def test_mismatch_names_the_parts():
    layout = TokenLayout.of((Segment("text", 256), grid_segment("main", 1, 8, 8)))
    assert layout.mismatch(320) is None
    reason = layout.mismatch(330)
    assert reason is not None and reason.code == "layout"
    assert "330 tokens" in reason.text and "256 text + 64 main = 320" in reason.text


@pytest.mark.parametrize(("length", "grid"), [(-1, None), (5, (1, 2, 2)), (0, (0, 1, 1))])
def test_wrong_segments_are_refused(length, grid):
    with pytest.raises(ValueError, match="main"):
        Segment("main", length, grid)
