"""Checks of values that come from files and prompts: JSON, its kinds, and numbers within bounds.

The bounds lie far above what makes sense, and below what hangs or fills a machine. Every check raises a ValueError of
one sentence. They are functions and not a schema library's models, whose messages are for programmers.
"""

import json
import math
from collections.abc import Callable, Collection
from typing import Any

from .shown import one_line, quote

MOST_TOKENS = 2**31 - 1  # no grid has more, so a larger distance means nothing else
MOST_SEED = 2**64 - 1
MOST_DEPTH = 32  # of lists and objects inside each other


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the JSON value of an untrusted text.

    Args:
        pairs: makes an object of its keys and values; by default the last value of a key counts.

    Raises:
        ValueError: it is no JSON; the text is a predicate such as "is not UTF-8 text". What `pairs` raises.
    """
    try:
        # decoded here, since the library guesses other encodings; editors may put a mark of the encoding before it
        return json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"), object_pairs_hook=pairs)
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        if type(error) is not ValueError:  # of `pairs`
            raise
        raise ValueError("is not JSON that can be read: it holds a number of thousands of digits") from None


def json_or_none(text: str | bytes) -> Any:
    """Return the JSON value of a text, None where it is none."""
    try:
        return parse_json(text)
    except ValueError:
        return None


def check_object(name: str, value: object, required: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """Return a value that is a JSON object with these keys; raise ValueError where it is none."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is a JSON object, got {type(value).__name__}")
    missing = [key for key in required if key not in value]
    if missing:
        raise ValueError(f"{name} has no key {', '.join(missing)}")
    unknown = [key for key in value if key not in required and key not in optional]
    if unknown:
        named = ", ".join(map(one_line, unknown[:3]))
        raise ValueError(f"{name} has no key {named}; it may have {', '.join((*required, *optional))}")
    return value


def check_text(name: str, value: object, most: int) -> str:
    """Return a value that is a text of 1 to `most` characters; raise ValueError where it is none."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is a text, got {quote(value)}")
    if len(value) > most:
        raise ValueError(f"{name} has at most {most} characters, got {len(value)}")
    return value


def check_boolean(name: str, value: object) -> None:
    """Raise ValueError where a value is neither true nor false."""
    if type(value) is not bool:
        raise ValueError(f"{name} is true or false, got {name}={quote(value)}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError where a value is none of the choices."""
    if value not in tuple(choices):  # a tuple, which also compares what has no hash
        raise ValueError(f"{name} is one of {', '.join(choices)}, got {quote(value)}")


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
