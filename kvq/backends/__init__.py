"""Which Keras backend to use, and what each one offers here. The only room of kvq, beside the exporters, that knows their names.

It imports neither Keras nor a backend by itself: `choose` must have its say before Keras is imported. Keras' own file
keras.json is not read, since Keras writes "tensorflow" into it unasked.
"""

import functools
import importlib.metadata
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from kvq.backends.gpu import gpu_found
from kvq.errors import BackendError, installing

# Each is also the name of the package to import and of the extra that installs it. In the order of preference without a GPU:
# which is the fastest is another on each processor, and JAX was on none so far.
BACKENDS = ("tensorflow", "torch", "jax")
GPU_ORDER = ("jax", "torch", "tensorflow")
NONE_INSTALLED = f"No backend is installed. Install {' or '.join(BACKENDS)}, as with: {installing(BACKENDS[0])}"
# Where more than one distribution brings the same package, any of them will do.
DISTRIBUTIONS = {
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tf-nightly", "tf-nightly-cpu"),
    "torch": ("torch",),
    "jax": ("jax",),
}
# These convolve channels first. Keras 3.15 copies a channels-last image twice on the way there (keras-team/keras #23279), where a
# transposed view would do: a step of `cifar10` took 1.7 times that of a loop by hand on two CPU cores.
CHANNELS_FIRST = {"torch"}
# In cache-sized blocks 1.3 to 1.9 times as fast as two minima there (16,384 latents, 512 and 8,192 codes); slower elsewhere.
FAST_ARGMIN = {"torch"}
# A shape that was not seen before costs these a compilation, of seconds.
COMPILES_EACH_SHAPE = {"jax", "tensorflow"}
# The gradients of kernels are slow on CPUs here: spelt out, a step took 0.34 of the time of a loop by hand on 32x32
# images with `paper`, 0.23 on 128x128 with `resnet`. PyTorch gains nothing by it in small images, and TensorFlow loses a third.
XLA_GRADIENTS = {"jax"}
# Channels from which on Winograd's tiles beat the gradients of a 3x3 convolution on CPUs. For 64 to 128 channels in 8x8 and
# 32x32 they take 0.65 to 0.9 of the time on TensorFlow and PyTorch with AVX-512, 0.5 to 0.9 without; for 64 to 64 up to 1.6.
WINOGRAD_CHANNELS = {"jax": 32, "tensorflow": 80, "torch": 80}
# Keras takes several training steps at a stretch on these, and refuses to on PyTorch.
SEVERAL_STEPS = {"jax", "tensorflow"}
JAX_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def choose(option: str | None = None, report: Callable[[str], None] | None = None) -> str:
    """Decide the backend and tell Keras, which reads `KERAS_BACKEND` when it is first imported.

    Args:
        option: The name asked for. Without it the backend of a Keras already imported, then `KERAS_BACKEND`, then `default()`.
        report: Called with a line that names the choice and its reason.

    Returns:
        The name of the backend.

    Raises:
        BackendError: If the name is not one of `BACKENDS`, its package is not installed, or Keras already runs on another.
    """
    running = _running()
    if option:
        name, reason = option, "--backend"
    elif running:
        name, reason = running, "Keras already runs on it"
    elif variable := os.environ.get("KERAS_BACKEND"):
        name, reason = variable, "KERAS_BACKEND"
    else:
        name, reason = default(), f"{'GPU' if gpu_found() else 'no GPU'} found; --backend chooses"

    check_name(name, f" (from {reason})")
    if name not in installed():
        raise BackendError(f"The backend {name} is not installed. Install it with: {installing(name)}")
    if running and running != name:
        raise BackendError(f"Keras already runs on {running} in this process. To use {name}, choose it before importing keras.")

    os.environ["KERAS_BACKEND"] = name
    # TensorFlow's C++ library, and XLA's in JAX, report every start-up on stderr; errors still come through.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if report:
        report(f"backend: {name} ({reason})")
    return name


def check_name(name: str, reason: str = "") -> None:
    """Raises BackendError unless it is one of `BACKENDS`."""
    if name not in BACKENDS:
        raise BackendError(f"The backend must be one of {', '.join(sorted(BACKENDS))}. Received: {name}{reason}.")


def default() -> str:
    """The backend that is used where nobody asked for one: the fastest that is installed, as far as a rule can tell."""
    names = installed()
    if not names:
        raise BackendError(NONE_INSTALLED)
    if not gpu_found():
        return names[0]
    able = [name for name in GPU_ORDER if name in names and not (name == "jax" and not jax_gpu_plugin())]
    return able[0] if able else names[0]


def installed() -> list[str]:
    """The installed backends, in the order of `BACKENDS`. Found without importing them."""
    return [name for name in BACKENDS if _importable(name)]


def versions() -> dict[str, str]:
    """The version of each installed backend."""
    found = {name: distributions(name) for name in installed()}
    return {name: importlib.metadata.version(names[0]) if names else "unknown" for name, names in found.items()}


def distributions(name: str) -> list[str]:
    """The installed distributions that bring the package of a backend. More than one overwrite each other's files."""
    return [distribution for distribution in DISTRIBUTIONS[name] if _version(distribution)]


def jax_gpu_plugin() -> bool:
    """Whether JAX could use an NVIDIA GPU: without one of its plugins it silently computes on the CPU."""
    return any(_importable(plugin) for plugin in JAX_GPU_PLUGINS)


def convolves_channels_first(name: str) -> bool:
    """Whether convolutions of a backend are fast where the channels come before height and width."""
    return name in CHANNELS_FIRST


def argmin_is_fast(name: str) -> bool:
    """Whether a backend finds the position of a smallest float faster than by comparing with the minimum, and exports it."""
    return name in FAST_ARGMIN


def row_sums(name: str) -> Callable[[Any, Any, int], Any] | None:
    """A backend's own sum of rows (n, d) by index (n,) into (count, d), for where that of `keras.ops` is not good enough.

    On PyTorch `segment_sum` writes down an index for each column, which takes longer than the sums. `scatter_update` adds in
    another order each time where a CPU gives it several threads, so that no two runs would be the same. Imports the backend.
    """
    if name != "torch":
        return None
    import torch

    return lambda rows, indices, count: torch.zeros((count, rows.shape[1]), device=rows.device).index_add(0, indices, rows)


def compiles_each_shape(name: str) -> bool:
    """Whether a backend compiles a model anew for every shape of its inputs."""
    return name in COMPILES_EACH_SHAPE


@functools.cache
def gradients_of_kernels_are_slow(name: str) -> bool:
    """Whether to spell out the gradients of convolutions' kernels as products of matrices. May import the backend."""
    return name in XLA_GRADIENTS and devices(name)[0] == "cpu"


@functools.cache
def winograd_channels(name: str) -> float:
    """How many channels a 3x3 convolution needs for its gradients to be faster in Winograd's tiles. May import the backend.

    The harmonic mean of those of its inputs and outputs: what is multiplied grows with their product, the tiles with their sum.
    """
    return WINOGRAD_CHANNELS.get(name, math.inf) if devices(name)[0] == "cpu" else math.inf


@functools.cache
def search_block(name: str) -> int:
    """How many distances between latents and codes to hold at once. May import the backend.

    4 MB stay in a processor's cache, where passing over them again costs little. On a GPU a block costs PyTorch 0.25 ms of Python
    (H100), so that there are fewer; still larger ones were not measured.
    """
    return 2**20 if devices(name)[0] == "cpu" else 2**21


def steps_at_once(name: str) -> int:
    """How many training steps Keras had best take before it comes back to its callbacks. May import the backend.

    On a GPU a step of a small model takes less than what lies between two. On a CPU it does not, and to stop there takes as long.
    """
    return 10 if name in SEVERAL_STEPS and devices(name)[0] != "cpu" else 1


def train_function(name: str, model: Any, note: Callable[[str], None]) -> Callable[..., Any] | None:
    """What takes the training steps of a compiled model; None for Keras' own, which it compiles on all backends but PyTorch.

    `note` is told where it must leave them to Keras after all. Imports the backend.
    """
    if name != "torch":
        return None
    from kvq.backends.recorded_step import RecordedStep

    return RecordedStep(model, note)


def devices(name: str) -> list[str]:
    """The devices that a backend sees, as `cpu` or `gpu: NVIDIA H200`. Imports the backend."""
    if name == "jax":
        import jax

        return ["cpu" if d.platform == "cpu" else f"{d.platform}: {d.device_kind}" for d in jax.devices()]
    if name == "tensorflow":
        import tensorflow as tf

        details = tf.config.experimental.get_device_details
        gpus = [f"gpu: {details(d).get('device_name', d.name)}" for d in tf.config.list_physical_devices("GPU")]
        return gpus or ["cpu"]
    import torch

    gpus = [f"gpu: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        gpus.append("gpu: Apple MPS")
    return gpus or ["cpu"]


def threads(name: str) -> int:
    """On how many threads a backend computes one operation on the CPU. Imports the backend."""
    if name == "torch":
        import torch

        return torch.get_num_threads()
    if name == "tensorflow":
        import tensorflow as tf

        # 0 stands for its own choice, which is one for each CPU.
        return tf.config.threading.get_intra_op_parallelism_threads() or cpus()
    return cpus()


def tf32(name: str) -> bool:
    """Whether a GPU may round the inputs of float32 convolutions or products to 10 bits (TF32). Imports the backend.

    Where it may, indices agree with those of a CPU only up to that rounding.
    """
    if name == "jax":
        import jax

        return jax.config.jax_default_matmul_precision not in {"highest", "float32"}
    if name == "tensorflow":
        import tensorflow as tf

        return bool(tf.config.experimental.tensor_float_32_execution_enabled())
    import torch

    return bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)


def process_environment(name: str) -> dict[str, str]:
    """The variables of another Python process, which `-P` must start, for it to run this backend with the same modules."""
    return {
        **os.environ,
        "KERAS_BACKEND": name,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }


def cpus() -> int:
    """The CPUs that this process may use, which in a container are often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _running() -> str | None:
    """The backend of the Keras that is already imported, if one is."""
    keras: Any = sys.modules.get("keras")
    return keras.config.backend() if keras is not None and hasattr(keras, "config") else None


def _importable(package: str) -> bool:
    # A folder that only happens to have the name, like one with a user's torch models, has no origin.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
