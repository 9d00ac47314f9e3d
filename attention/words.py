"""Numbers as people read them, in one spelling everywhere: counts with their noun, sizes of files and of memory."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, as "1 site" and "2 sites"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def memory_size(num_bytes: float) -> str:
    """Return a size in MiB or GiB, as memory is sold."""
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.1f} GiB"


def file_size(num_bytes: int) -> str:
    """Return a file's size in kB or MB of decimal thousands, as the Hub shows it."""
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"
