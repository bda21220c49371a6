"""What is known of the networks without building them is what is built."""

import pydantic
import pytest

from kvq.config import ModelConfig
from kvq.network_shapes import KERNELS, kernels
from kvq.networks import ENCODERS, build_decoder, build_encoder

CASES = {
    "plain": [{}],
    "resnet": [{}],
    "paper": [
        {"hidden": 10, "residual_blocks": 3, "residual_hidden": 4},
        {"hidden": 7, "residual_blocks": 0, "residual_hidden": 4},
    ],
}


def test_every_network_has_its_kernels():
    assert KERNELS.keys() == ENCODERS.keys() == CASES.keys()


@pytest.mark.parametrize("network, arguments", [(name, each) for name in CASES for each in CASES[name]], ids=str)
@pytest.mark.parametrize("channels, dim", [(1, 8), (3, 21)])
def test_kernels_are_those_of_the_network(network, arguments, channels, dim):
    built = {}
    for half in (build_encoder(network, channels, dim, **arguments), build_decoder(network, channels, dim, **arguments)):
        for weight in half.weights:
            *_, layer, name = weight.path.split("/")
            built[f"{half.name}.{layer.replace('_', '.')}.{name}"] = list(weight.shape)
    section = pydantic.TypeAdapter(ModelConfig).validate_python({"network": network, "latent_dim": dim, **arguments})
    assert kernels(section, channels) == {name: shape for name, shape in built.items() if name.endswith(".kernel")}
    # Nothing else that a network has grows with the square of its width.
    assert all(len(shape) == 1 for name, shape in built.items() if not name.endswith(".kernel"))
