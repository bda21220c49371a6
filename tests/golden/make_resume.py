"""Stores what tests/test_resume.py goes on with: a run of 100 steps on JAX, and the losses of the next 50 there.

KERAS_BACKEND=jax python tests/golden/make_resume.py
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np

from kvq.config import load_config
from kvq.run import Run
from kvq.training import train

HERE = Path(__file__).parent / "resume"
SETTINGS = (
    "train.batch_size=32",
    'train.schedule="constant"',
    "train.warmup_steps=10",
    "train.learning_rate=2e-3",
    "train.log_every=1",
    'model={network="paper", hidden=16, residual_blocks=1, residual_hidden=8, latent_dim=8}',
    'quantizer={kind="ema_vector", codebook_size=16}',
    "data.validation_images=16",
    "checkpoint.every_steps=100",
    "checkpoint.keep=1",
    "train.sample_every=1000",
    "train.validate_every=1000",
)


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run")
        train(load_config("fashion_mnist_mini", [*SETTINGS, "train.steps=100"]), run.folder)
        for name in ("config.toml", "run.json"):
            (HERE / "run").mkdir(parents=True, exist_ok=True)
            shutil.copy(run.folder / name, HERE / "run")
        shutil.copytree(run.checkpoints, HERE / "run" / "checkpoints")
        train(load_config("fashion_mnist_mini", [*SETTINGS, "train.steps=150"]), run.folder, resume=True)
        losses = [record["loss"] for record in run.read_metrics() if record["split"] == "train" and record["step"] > 100]
    np.save(HERE / "losses.npy", np.array(losses))


if __name__ == "__main__":
    main()
