"""What outlives a call: allocated inside the host's pause, bounded, made once."""

import contextlib

from linearize.attention.memory import LongLived


def test_values_are_made_once_and_inside_the_pause():
    events = []

    @contextlib.contextmanager
    def pause():
        events.append("pause")
        yield
        events.append("resume")

    memory = LongLived(pause)

    def make():
        events.append("make")
        return "value"

    assert [memory.get("key", make, len) for _ in range(3)] == ["value"] * 3
    assert events == ["pause", "make", "resume"]
    memory.clear()
    memory.get("key", make, len)
    assert events.count("make") == 2


def test_the_least_recently_used_value_goes_first():
    memory = LongLived(max_bytes=10)
    made = []

    def get(key, size):
        return memory.get(key, lambda: made.append(key) or key * size, len)

    get("a", 4), get("b", 4), get("a", 4), get("c", 4)
    made.clear()
    get("a", 4), get("c", 4)
    assert made == []
    get("b", 4)
    assert made == ["b"]


def test_a_value_above_the_bound_is_not_kept():
    memory = LongLived(max_bytes=3)
    assert memory.get("a", lambda: "aaaa", len) == "aaaa"
    assert memory.get("a", lambda: "bb", len) == "bb"
