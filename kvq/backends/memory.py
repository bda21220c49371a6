"""Memory that one training step frees, kept for the next."""

import ctypes
import os
import sys

from kvq.backends.gpu import gpu_found

# glibc's names for them (malloc.h).
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8
# Bytes in one block; larger ones go back to the system. Before version 2.35 glibc takes no more than the second.
LARGEST_KEPT = 2**30, 2**25
# These allocate in several threads, each of which would keep its own.
ALLOCATES_IN_THREADS = {"jax"}
# Here each has its own, in pieces of 64 MiB that glibc gives back whole, unless it is to have so much to spare.
THREADS_KEEP = {"tensorflow": 2**26}


def keep_freed_memory(name: str) -> bool:
    """Tells the C library of Linux to keep what is freed, where a backend computes on the CPU. To be called before its import.

    Left to itself it gives large blocks back to the system at once, and the tensors of each step are mapped and cleared page by
    page again: a tenth of the time of a step of `mscoco_resnet` on PyTorch, a quarter on JAX (two CPU cores). Kept memory lies in
    pieces: these processes held 0.1 and 0.3 to 0.9 GB more. TensorFlow, whose step of W1 (docs/benchmarks.md) had half a gigabyte
    mapped anew on one processor, took 0.6 of the time; on another it kept its memory by itself.

    Args:
        name: The backend.

    Returns:
        Whether it was told: not where there is a GPU, another C library, or a setting of the environment about memory.
    """
    asked = [key for key in os.environ if key.startswith("MALLOC_") or key in {"GLIBC_TUNABLES", "LD_PRELOAD"}]
    if sys.platform != "linux" or asked or gpu_found():
        return False
    try:
        tell = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    # First, since the others fix it where it is: at 128 KiB, of which nothing would be kept.
    if not any(tell(MMAP_THRESHOLD, largest) for largest in LARGEST_KEPT):
        return False
    tell(TRIM_THRESHOLD, -1)
    if name in ALLOCATES_IN_THREADS:
        tell(ARENA_MAX, 1)
    if name in THREADS_KEEP:
        tell(TOP_PAD, THREADS_KEEP[name])
    return True
