"""What outlives one attention call: key tables and flags, kept for one sampling run.

Newer versions of ComfyUI record the allocations of each block and stop if an unrecorded one happens inside it. Every
long-lived allocation of the pack therefore goes through `LongLived`, which enters the pause that the host offers.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")
MAX_BYTES = 256 * 2**20


class LongLived:
    """A cache of values that outlive a call, bounded in bytes, safe between threads.

    Args:
        pause: returns a context manager to enter around allocations that outlive a call.
        max_bytes: the least recently used values are dropped beyond this.
    """

    def __init__(
        self,
        pause: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.pause = pause
        self.max_bytes = max_bytes
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T], num_bytes: Callable[[T], int]) -> T:
        """Return the value of `key`, made on first use; one that alone exceeds the bound is not kept.

        Args:
            key: names the value, device included.
            make: allocates and returns it.
            num_bytes: its size.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
            with self.pause():
                value = make()
            size = num_bytes(value)
            if size <= self.max_bytes:
                self._values[key] = (value, size)
                self._num_bytes += size
            while self._num_bytes > self.max_bytes:
                _, (_, dropped) = self._values.popitem(last=False)
                self._num_bytes -= dropped
            return value

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._values.clear()
            self._num_bytes = 0
