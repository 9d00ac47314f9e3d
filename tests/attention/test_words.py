"""Numbers as people read them."""

import pytest

from linearize.attention.words import counted, memory_size


@pytest.mark.parametrize(("number", "text"), [(0, "0 sites"), (1, "1 site"), (2, "2 sites")])
def test_a_number_agrees_with_its_noun(number, text):
    assert counted(number, "site") == text


@pytest.mark.parametrize(
    ("num_bytes", "size"),
    [(0, "0.0 MiB"), (2**30 - 2**20, "1023.0 MiB"), (2**30, "1.0 GiB"), (3 * 2**29, "1.5 GiB")],
)
def test_sizes_of_memory(num_bytes, size):
    assert memory_size(num_bytes) == size
