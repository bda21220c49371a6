"""Stores what tests/test_parity.py compares with. Needs all three backends in one environment:

    kvq train fashion_mnist_mini --backend tensorflow --steps 300 --out RUN
    python tests/golden/make_golden.py RUN

plain/        the model of that run; any would do whose latents are those of images
indices.npz   NumPy's float64 indices of the 500 test images
training.npz  weights to start from, drawn in NumPy, and the losses of the first steps from there on each backend
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

# Of six seeds, five keep the backends within 3e-6 of each other over 20 steps; with seed 2 they part at step 18 (1.2e-5).
SEED = 0


def main(run: str) -> None:
    shutil.copytree(Path(run) / "model", HERE / "plain", dirs_exist_ok=True)
    weights = {f"weights/{name}": array for name, array in initial_weights().items()}
    np.savez_compressed(HERE / "training.npz", **weights)
    curves = {}
    for backend in ("jax", "tensorflow", "torch"):
        environment = {**os.environ, "KERAS_BACKEND": backend}
        printed = subprocess.run(
            [sys.executable, __file__, "--losses"], env=environment, capture_output=True, text=True, check=True
        )
        curves |= {f"{kind}/{backend}": np.array(curve) for kind, curve in json.loads(printed.stdout.splitlines()[-1]).items()}
    np.savez_compressed(HERE / "training.npz", **weights, **curves)
    np.savez_compressed(HERE / "indices.npz", indices=indices())


def initial_weights(seed: int = SEED) -> dict[str, np.ndarray]:
    """He-normal kernels and small codes, by name, for the model of the tests."""
    import test_parity as parity

    from kvq import artifact
    from kvq.model import VQVAE

    rng = np.random.default_rng(seed)
    quantizer = parity.VectorQuantizer(parity.CODES, name="quantizer")
    model = VQVAE(parity.build_encoder("plain", 1, parity.DIM), quantizer, parity.build_decoder("plain", 1, parity.DIM))
    model.build((None, None, None, 1))
    drawn = {}
    for name, weight in artifact.tensors(model):
        shape = tuple(weight.shape)
        if name.endswith("kernel"):
            inputs = shape[3] if ".up." in name else shape[2]
            drawn[name] = rng.normal(scale=np.sqrt(2 / (shape[0] * shape[1] * inputs)), size=shape)
        elif name == "quantizer.codebook":
            drawn[name] = rng.normal(scale=0.25, size=shape)
        elif weight.trainable:
            drawn[name] = np.ones(shape) if name.endswith("gamma") else np.zeros(shape)
    return {name: array.astype("float32") for name, array in drawn.items()}


def indices() -> np.ndarray:
    import test_parity as parity

    weights = parity.load_file(parity.MODEL / "model.safetensors")
    return parity.distances_in_numpy(parity.test_images(), weights).argmin(-1).astype("uint8")


def print_losses() -> None:
    import test_parity as parity

    with np.load(HERE / "training.npz") as file:
        weights = {name.removeprefix("weights/"): file[name] for name in file.files}
    curves = {"searched": parity.losses(weights), "given": parity.losses(weights, parity.given_indices())}
    print(json.dumps({kind: curve.tolist() for kind, curve in curves.items()}))


if __name__ == "__main__":
    if sys.argv[1:] == ["--losses"]:
        print_losses()
    else:
        main(*sys.argv[1:])
