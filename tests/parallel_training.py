"""Trains small quantizers for 50 steps on one or two virtual devices, and prints losses and statistics; run by a test."""

import json
import sys

import keras
import numpy as np
from keras import ops

from kvq.quantizers import QUANTIZERS
from kvq.quantizers.regularisers import Entropy

DIM, POSITIONS, BATCH, STEPS = 6, 5, 8, 50


class Model(keras.Model):
    """Latents of a linear map, quantized; the loss pulls the codes towards the inputs."""

    def __init__(self, quantizer):
        super().__init__()
        self.encoder = keras.layers.Dense(DIM, kernel_initializer=keras.initializers.RandomNormal(stddev=0.5, seed=1))
        self.quantizer = quantizer

    def call(self, inputs, training=False):
        outputs = self.quantizer(self.encoder(inputs), training=training)
        return {"codes": outputs["codes"], **outputs["losses"]}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        terms = {**y_pred}
        error = ops.mean(ops.square(terms.pop("codes") - x))
        return error + sum(ops.mean(values) for values in terms.values())


def main(devices: int) -> None:
    if devices > 1:
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=keras.distribution.list_devices("cpu")))
    images = np.random.default_rng(0).normal(size=(BATCH * STEPS, POSITIONS, DIM)).astype("float32")
    cases = {
        "ema_vector": {"codebook_size": 16, "regularisers": [Entropy(temperature=0.5)]},
        "vector": {"codebook_size": 16},
        "lookup_free": {"bits": DIM},
    }
    printed = {}
    for kind, arguments in cases.items():
        keras.utils.set_random_seed(0)
        model = Model(QUANTIZERS[kind](**arguments))
        model.compile(optimizer=keras.optimizers.SGD(0.02))
        history = model.fit(images, batch_size=BATCH, shuffle=False, verbose=0)
        printed[f"{kind} loss"] = history.history["loss"]
        printed[f"{kind} kernel"] = np.array(model.encoder.kernel).ravel().tolist()
        for name in ("codebook", "counts"):
            if hasattr(model.quantizer, name):
                printed[f"{kind} {name}"] = np.array(getattr(model.quantizer, name)).ravel().tolist()
    print(json.dumps(printed))


if __name__ == "__main__":
    main(int(sys.argv[1]))
