"""Bounds of numbers that come from files: far above what makes sense, and below what hangs or fills a machine."""

import math

from .shown import quote

MOST_TOKENS = 2**31 - 1  # no grid has more, so a larger distance means nothing else
MOST_SEED = 2**64 - 1
MOST_DEPTH = 32  # of lists and objects inside each other


def check_whole(name: str, value: object, least: int, most: int, meaning: str = "") -> None:
    """Raise ValueError where a value is no whole number of `least` to `most`; `meaning` says what the least means."""
    if type(value) is int and least <= value <= most:
        return
    if type(value) is int and value > most:
        raise ValueError(f"{name} is a whole number of at most {most}, got {quote(value)}")
    told, got = (f" ({meaning})", f"{name}={quote(value)}") if meaning else ("", quote(value))
    raise ValueError(f"{name} is a whole number of at least {least}{told}, got {got}")


def check_number(name: str, value: object, most: float, *, above_zero: bool = False) -> None:
    """Raise ValueError where a value is no number of 0 to `most`, or none above 0."""
    # type, since True is an int; compared as it is, since a whole number may be too large for a float
    if type(value) not in (int, float) or not 0 <= value <= most or (above_zero and value == 0):  # pyright: ignore
        least = "above 0" if above_zero else "of at least 0"
        raise ValueError(f"{name} is a number {least} and at most {most:g}, got {quote(value)}")


def check_json(name: str, value: object, depth: int = MOST_DEPTH) -> None:
    """Raise ValueError where a value that JSON gave is nested deeply, or holds a number beyond every use."""
    if isinstance(value, (dict, list)):
        if not depth:
            raise ValueError(f"{name} is nested too deeply, at most {MOST_DEPTH} lists and objects deep")
        for each in value.values() if isinstance(value, dict) else value:
            check_json(name, each, depth - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} holds a number that is infinite or NaN")
    elif type(value) is int and abs(value) > MOST_SEED:
        raise ValueError(f"{name} holds a number that is too large, {quote(value)}")
