"""The C library's heap, as a command wants it on a CPU."""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Stops glibc from giving every large freed block back to the kernel, and fetching it again page by page.

    Networks on a CPU spend 5 to 20% of their time that way, and convolution networks of evaluation half of it
    (benchmarks/LOG.md). Tunes the whole process, so it is for commands, not for a library's callers; elsewhere
    than on glibc it does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap
        mallopt(M_TRIM_THRESHOLD, -1)  # and stay there
        mallopt(M_ARENA_MAX, 1)  # in threads, too, whose own heaps end at 64 MiB
