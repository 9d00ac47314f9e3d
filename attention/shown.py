"""Untrusted text (of files, names, hosts, other programs) in a form that is safe to show to a person.

On one line, of printable characters, of bounded length. `hub/model_card.py` knows what Markdown would make of it.
"""

from collections.abc import Sequence

LONGEST = 80  # characters of a value in a sentence
LONGEST_REASON = 500  # of a whole sentence


def printable(text: str) -> str:
    """Return `text` with escapes, as Python writes them, in place of all that is not printable.

    That is line breaks, control characters and what starts with them, marks that change the direction of writing,
    invisible characters, halves of a character.
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def one_line(value: object, longest: int = LONGEST) -> str:
    """Return a value as text on one printable line, cut where it is long."""
    return _cut(printable(str(value)[: longest + 1]), longest)


def quote(value: object, longest: int = LONGEST) -> str:
    """Return a value as Python writes it, texts in quotation marks, on one printable line, cut where it is long."""
    try:
        return _cut(repr(value[: longest + 1] if isinstance(value, (str, bytes, list)) else value), longest)
    except (ValueError, RecursionError):  # thousands of digits, or of lists inside each other
        return f"a {type(value).__name__} too long to show"


def quote_some(values: Sequence[object]) -> str:
    """Return the first of a file's values, quoted, and how many more there are."""
    more = f" and {len(values) - 3} more" if len(values) > 3 else ""
    return ", ".join(quote(value) for value in values[:3]) + more


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + "..."
