"""Whether there is a GPU to choose a backend for, before any backend is imported."""

import functools
import os
import shutil
import subprocess
from pathlib import Path


def gpu_found() -> bool:
    """Whether this machine shows an NVIDIA GPU to this process. Imports no backend."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in {"", "-1"}:
        return False
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    # Windows, and Linux inside of it, have no such device files. The program exists on machines without a GPU as well, so ask it.
    program = shutil.which("nvidia-smi")
    return program is not None and _lists_a_gpu(program)


@functools.cache
def _lists_a_gpu(program: str) -> bool:
    try:
        answer = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU" in answer.stdout
