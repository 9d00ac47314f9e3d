"""Numbers as people read them, in one spelling everywhere: counts, shares, seconds, sizes of files and of memory."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, as "1 site" and "2 sites"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def memory_size(num_bytes: float) -> str:
    """Return a size in MiB or GiB, as memory is sold."""
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.1f} GiB"


def file_size(num_bytes: int) -> str:
    """Return a file's size in kB or MB of decimal thousands, as the Hub shows it."""
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"


def percent(share: float) -> str:
    """Return a share of 0 to 1 as "17 %", with a digit more below one percent."""
    return f"{100 * share:.{1 if 0 < share < 0.01 else 0}f} %"


def seconds_as_text(seconds: float) -> str:
    """Return seconds with the digits that mean something: "0.31", "4.7", "128"."""
    return f"{seconds:.2g}" if seconds < 1 else f"{seconds:.{1 if seconds < 20 else 0}f}"


def time_left(seconds: float) -> str:
    """Return the time that is left, roughly."""
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"
