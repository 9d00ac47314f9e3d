"""Numbers from files: what lies on a bound is taken, what lies beyond it is refused by name."""

import math

import pytest

from linearize.attention.checks import (
    MOST_DEPTH,
    MOST_SEED,
    check_boolean,
    check_choice,
    check_json,
    check_number,
    check_object,
    check_text,
    check_whole,
    json_or_none,
    parse_json,
)


@pytest.mark.parametrize("value", [2, 3, 5])
def test_whole_numbers_up_to_their_bounds_are_taken(value):
    check_whole("rate", value, 2, 5)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1, "rate is a whole number of at least 2 (two are a pair), got rate=1"),
        (6, "rate is a whole number of at most 5, got 6"),
        (2.0, "rate is a whole number of at least 2 (two are a pair), got rate=2.0"),
        (True, "rate is a whole number of at least 2 (two are a pair), got rate=True"),
    ],
)
def test_other_whole_numbers_are_refused(value, words):
    with pytest.raises(ValueError) as error:
        check_whole("rate", value, 2, 5, "two are a pair")
    assert str(error.value) == words


def test_without_a_meaning_the_value_stands_alone():
    with pytest.raises(ValueError, match="^rate is a whole number of at least 2, got 1$"):
        check_whole("rate", 1, 2, 5)


@pytest.mark.parametrize(("value", "above_zero"), [(0, False), (0.0, False), (1e-9, True), (2, True), (2.0, False)])
def test_numbers_up_to_their_bounds_are_taken(value, above_zero):
    check_number("scale", value, 2, above_zero=above_zero)


@pytest.mark.parametrize(
    ("value", "above_zero"),
    [(0, True), (0.0, True), (-1e-9, False), (2.1, False), (math.nan, False), (math.inf, False), (True, False),
     ("1", False), (10**400, False)],
    ids=range(9),
)  # fmt: skip
def test_other_numbers_are_refused(value, above_zero):
    least = "above 0" if above_zero else "of at least 0"
    with pytest.raises(ValueError, match=f"^scale is a number {least} and at most 2, got "):
        check_number("scale", value, 2, above_zero=above_zero)


def lists(depth, inmost):
    return [lists(depth - 1, inmost)] if depth else inmost


def objects(depth, inmost):
    return {"a": objects(depth - 1, inmost)} if depth else inmost


@pytest.mark.parametrize("nested", [lists, objects])
def test_json_is_taken_to_its_depth_and_no_deeper(nested):
    check_json("its recipe", nested(MOST_DEPTH, 1))
    check_json("its recipe", {"a": [1, 2.5, "x", None, True, MOST_SEED, -MOST_SEED]})
    with pytest.raises(ValueError, match="its recipe is nested too deeply, at most 32 lists and objects deep"):
        check_json("its recipe", nested(MOST_DEPTH + 1, 1))


@pytest.mark.parametrize("nested", [lists, objects])
@pytest.mark.parametrize(
    ("value", "words"),
    [(math.nan, "infinite or NaN"), (-math.inf, "infinite or NaN"), (MOST_SEED + 1, "too large"),
     (-MOST_SEED - 1, "too large")],
)  # fmt: skip
def test_numbers_beyond_every_use_are_found_at_every_depth(nested, value, words):
    for depth in (0, 1, 3):
        with pytest.raises(ValueError, match=f"its recipe holds a number that is {words}"):
            check_json("its recipe", nested(depth, value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{1}", "is not JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
        (b"\xff", "is not UTF-8 text"),
        ("[" * 10**5, "is nested too deeply"),
        ("9" * 10**4, "holds a number of thousands of digits"),
    ],
)
def test_texts_that_are_no_json(text, words):
    with pytest.raises(ValueError) as error:
        parse_json(text)
    assert str(error.value).startswith("is not ") and words in str(error.value) and json_or_none(text) is None


def test_json_as_editors_write_it():
    assert parse_json('\ufeff{"a": 1}'.encode()) == json_or_none('{"a": 1}') == {"a": 1}


def test_what_makes_objects_may_refuse():
    class Refusal(ValueError):
        pass

    def refuse(pairs):
        raise Refusal

    with pytest.raises(Refusal):
        parse_json("{}", refuse)


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (lambda: check_object("a job", [1], ("model",)), "a job is a JSON object, got list"),
        (lambda: check_object("a job", {"a": 1}, ("model",)), "a job has no key model"),
        (
            lambda: check_object("a job", {"model": 1, "x": 1}, ("model",), ("seed",)),
            "a job has no key x; it may have model, seed",
        ),
        (lambda: check_text("kind", "", 3), "kind is a text, got ''"),
        (lambda: check_text("kind", 5, 3), "kind is a text, got 5"),
        (lambda: check_text("kind", "abcd", 3), "kind has at most 3 characters, got 4"),
        (lambda: check_boolean("causal", 1), "causal is true or false, got causal=1"),
        (lambda: check_choice("loss", ["l1"], ("l1", "l2")), "loss is one of l1, l2, got ['l1']"),
    ],
)
def test_other_values_are_refused(check, words):
    with pytest.raises(ValueError) as error:
        check()
    assert str(error.value) == words


def test_values_as_they_should_be():
    assert check_object("a job", {"model": 1}, ("model",), ("seed",)) == {"model": 1}
    assert check_text("kind", "abc", 3) == "abc"
    check_boolean("causal", False)
    check_choice("loss", "l2", ("l1", "l2"))
