"""What a process that runs networks on a CPU asks of the C library."""

import ctypes
import sys

# mallopt(3); a thread's own arena could not grow beyond 64 MB
KEPT = 2**28  # bytes
OPTIONS = {"M_TRIM_THRESHOLD": (-1, KEPT), "M_MMAP_THRESHOLD": (-3, KEPT), "M_ARENA_MAX": (-8, 1)}


def keep_memory() -> None:
    """Have glibc keep freed memory for what comes next, up to `KEPT` bytes of it and blocks of as many; elsewhere do nothing.

    By default it gives blocks of more than 32 MB back to the system after each layer of a network, and to get them anew, page
    by page, takes as long as the arithmetic. For programs, which own their process, not for the library.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
        for option in OPTIONS.values() if mallopt else ():
            mallopt(*option)
