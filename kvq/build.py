"""A configuration becomes a model. Here configuration ends: what is built gets plain arguments."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from kvq.config import LossConfig, ModelConfig, QuantizerConfig, Section, TrainConfig
from kvq.model import MODELS, VQVAE
from kvq.networks import build_decoder, build_encoder
from kvq.optimizer import Constant, FiniteSteps, Warmup
from kvq.quantizers import QUANTIZERS, Quantizer
from kvq.quantizers.regularisers import REGULARISERS


def build_model(
    model: ModelConfig, quantizer: QuantizerConfig, loss: LossConfig, channels: int, precision: str = "float32"
) -> VQVAE:
    """A model with its weights, for uint8 images (batch, h, w, channels).

    Args:
        model, quantizer, loss: Sections of a configuration.
        channels: Of the images.
        precision: Keras' name of the dtype policy that the layers get.
    """
    network = _arguments(model, without={"kind"})
    name, latent_dim = network.pop("network"), network.pop("latent_dim")
    with _dtype_policy(precision):
        built = MODELS[model.kind](
            encoder=build_encoder(name, channels, latent_dim, **network),
            quantizer=build_quantizer(quantizer, "quantizer"),
            decoder=build_decoder(name, channels, latent_dim, **network),
            loss_weights=loss.model_dump(),
            name=model.kind,
        )
        built.build((None, None, None, channels))
    return built


def build_optimizer(train: TrainConfig) -> FiniteSteps:
    """Adam behind `FiniteSteps`, at the rate that the configuration describes."""
    averaging = {} if train.average_decay is None else {"use_ema": True, "ema_momentum": train.average_decay}
    adam = keras.optimizers.Adam(_learning_rate(train), global_clipnorm=train.clip_norm, **averaging)
    return FiniteSteps(adam, tolerated=train.most_skipped if train.on_nonfinite == "skip" else 0)


def _learning_rate(train: TrainConfig) -> keras.optimizers.schedules.LearningRateSchedule:
    rate = train.learning_rate
    decay = max(train.steps - train.warmup_steps, 1)
    schedule = Constant(rate) if train.schedule == "constant" else keras.optimizers.schedules.CosineDecay(rate, decay)
    return Warmup(schedule, train.warmup_steps) if train.warmup_steps else schedule


def build_quantizer(section: Any, name: str) -> Quantizer:
    """The quantizer that a section describes, with the quantizers inside it, all named."""
    arguments = _arguments(section, without={"kind", "base", "regularisers"})
    match section.kind:
        case "residual":
            arguments["members"] = _members(section.base, "level", arguments.pop("levels"))
        case "shared_residual":
            arguments["members"] = [build_quantizer(section.base, "level")]
        case "product":
            arguments["members"] = _members(section.base, "group", arguments.pop("groups"))
        case "projected":
            arguments["base"] = build_quantizer(section.base, "base")
    if regularisers := getattr(section, "regularisers", ()):
        arguments["regularisers"] = [REGULARISERS[one.kind](**_arguments(one, without={"kind"})) for one in regularisers]
    return QUANTIZERS[section.kind](**arguments, name=name)


def _members(base: Any, name: str, count: int) -> list[Quantizer]:
    """As many of one kind; those that draw random numbers draw each its own."""
    seeds = [{"seed": base.seed + number} if hasattr(base, "seed") else {} for number in range(count)]
    return [build_quantizer(base.model_copy(update=seed), f"{name}{number}") for number, seed in enumerate(seeds)]


def _arguments(section: Section, without: set[str]) -> dict[str, Any]:
    return section.model_dump(exclude=without)


@contextlib.contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
