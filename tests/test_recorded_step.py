"""On PyTorch a recorded step computes what Keras' own step computes, to the bit, and one that cannot be repeated is not."""

import keras
import numpy as np
import pytest

from kvq.config import parse_config
from kvq.training import compiled

if keras.backend.backend() != "torch":
    pytest.skip("Steps are recorded on PyTorch alone; Keras compiles those of the other backends.", allow_module_level=True)

import torch

from kvq.backends.recorded_step import NotRepeatable, RecordedStep, record

# What draws random numbers in a step.
NOT_RECORDED = {"gumbel"}
BATCHES = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 8, 1), np.uint8)


SMALL = '{network = "paper", latent_dim = 6, hidden = 4, residual_hidden = 3, residual_blocks = 1}'


def build(section, *overrides):
    keras.utils.set_random_seed(0)
    fixed = ["train.batch_size=6", "train.steps=20", "train.warmup_steps=3", "data.crop=8", "data.pad=0"]
    text = 'train = {schedule = "cosine", learning_rate = 0.01}\ndata.source = "fashion_mnist_mini"\n'
    text += f"model = {SMALL}\nquantizer = {toml(section)}\n"
    return compiled(parse_config(text, "the test", [*fixed, *overrides]), channels=1)


def toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + "}"
    return repr(value).replace("'", '"')


def pair(section, *overrides):
    """The same model twice: with recorded steps, and with Keras' own."""
    recorded, own = build(section, *overrides), build(section, *overrides)
    for one, other in zip(recorded.variables, own.variables, strict=True):
        other.assign(one)
    assert isinstance(recorded.train_function, RecordedStep)
    own.train_function = None
    own.make_train_function()
    return recorded, own


def step(model, images):
    model.train_function([(images,)])


def assert_the_same(recorded, own):
    sums = set(map(id, own._loss_tracker.variables))  # Keras' mean of the loss, which kvq has no use for
    state = [*zip(recorded.variables, own.variables, strict=True)]
    state += zip(recorded.optimizer.variables, own.optimizer.variables, strict=True)
    for one, other in state:
        if id(other) not in sums:
            assert torch.equal(one.value, other.value), one.path


def test_every_quantizer_trains_to_the_same_bits(quantizer_kind, quantizer_section):
    recorded, own = pair(quantizer_section(quantizer_kind, 6))
    for images in BATCHES:
        step(recorded, images)
        step(own, images)
    assert recorded.train_function.recorded == (quantizer_kind not in NOT_RECORDED)
    assert int(recorded.optimizer.iterations) == len(BATCHES)
    assert_the_same(recorded, own)


VECTOR = {"kind": "vector", "codebook_size": 9}
OPTIONS = {
    "bfloat16": ['train.precision="mixed_bfloat16"'],
    "averages and clipping": ["train.average_decay=0.9", "train.clip_norm=0.1"],
    # Large enough kernels for a sum over them to depend on their layout.
    "wide, clipped": [
        'model={network="paper", latent_dim=32, hidden=64, residual_hidden=32, residual_blocks=2}',
        "train.clip_norm=0.01",
    ],
    "constant rate": ['train.schedule="constant"', "train.warmup_steps=0"],
    "no warm-up": ["train.warmup_steps=0"],
    "frozen codebook": ["codebook.frozen=true", 'codebook.initialise="none"'],
    "rotation": ['quantizer.estimator="rotation"'],
    "entropy": ['quantizer.regularisers=[{kind="entropy"}]'],
    "a codebook in blocks": ["quantizer.codebook_size=20000"],
    "resnet": ['model={network="resnet", latent_dim=6}'],
    "plain": ['model={network="plain", latent_dim=6}'],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_training_trains_to_the_same_bits(option):
    recorded, own = pair(VECTOR, *OPTIONS[option])
    for images in BATCHES:
        step(recorded, images)
        step(own, images)
    assert recorded.train_function.recorded
    assert_the_same(recorded, own)


def test_what_draws_random_numbers_is_left_to_keras(quantizer_section):
    recorded, own = pair({**quantizer_section("residual", 6), "dropout": 0.5})
    notes = []
    recorded.train_function.note = notes.append
    for images in BATCHES:
        step(recorded, images)
        step(own, images)
    assert not recorded.train_function.recorded
    assert len(notes) == 1 and "value" in notes[0] and "\n" not in notes[0]
    assert_the_same(recorded, own)


def test_a_weight_that_is_changed_between_steps_counts():
    recorded, own = pair({"kind": "ema_vector", "codebook_size": 9})
    for images in BATCHES:
        for model in (recorded, own):
            step(model, images)
            model.quantizer.replace(np.arange(3), np.ones((3, 6), "float32"))
            model.optimizer.forget(model.encoder.trainable_weights[0], np.arange(2))
            model.reset_metrics()
    assert_the_same(recorded, own)


def test_a_step_that_is_not_finite_is_not_taken():
    recorded, own = pair(VECTOR, 'train.on_nonfinite="skip"', "train.most_skipped=2")
    for number, images in enumerate(BATCHES):
        for model in (recorded, own):
            bias = model.decoder.trainable_weights[-1]
            before = np.array(keras.ops.convert_to_numpy(bias))
            if number == 2:
                bias.assign(np.full_like(before, np.nan))
            step(model, images)
            if number == 2:
                assert np.isnan(keras.ops.convert_to_numpy(bias)).all()
                bias.assign(before)
    assert recorded.optimizer.skipped == 1 and recorded.optimizer.last_skipped == 3
    assert_the_same(recorded, own)


def test_batches_of_another_size_are_recorded_as_well():
    recorded, own = pair(VECTOR)
    for size in (6, 2, 6, 2):
        step(recorded, BATCHES[0][:size])
        step(own, BATCHES[0][:size])
    assert recorded.train_function.recorded and len(recorded.train_function._repeats) == 2
    assert_the_same(recorded, own)


def test_batches_of_another_type_are_recorded_as_well():
    recorded, own = pair(VECTOR)
    for images in (BATCHES[0].astype("float32"), BATCHES[0], BATCHES[1].astype("float64")):
        step(recorded, images)
        step(own, images)
    assert recorded.train_function.recorded
    assert_the_same(recorded, own)


def test_a_recording_that_fails_has_changed_nothing():
    recorded, own = pair(VECTOR)
    take = recorded.optimizer.take
    recorded.optimizer.take = lambda *gradients: (take(*gradients), torch.rand(1))
    for images in BATCHES:
        step(recorded, images)
        step(own, images)
    assert not recorded.train_function.recorded
    assert_the_same(recorded, own)


def repeated(function, *inputs, state=()):
    with torch.no_grad():
        return record(function, inputs, state)[0]


def test_a_recording_reads_its_inputs_and_its_state_anew():
    total = torch.zeros(3)

    def add(values):
        total.add_(values)
        return [total * 2.0]

    again = repeated(add, torch.ones(3), state=[total])
    assert again(torch.full((3,), 5.0))[0].tolist() == [12.0] * 3
    total.zero_()
    assert again(torch.ones(3))[0].tolist() == [2.0] * 3


def test_a_number_is_made_once_unless_it_is_written_to():
    made = []

    def count(values):
        made.append(None)
        number = torch.tensor(2.0) * torch.tensor(3.0)
        written = torch.tensor(1.0)
        written.add_(values.sum())
        return [values * number, written * 1.0]

    again = repeated(count, torch.ones(2))
    for _ in range(3):
        scaled, one_more = again(torch.ones(2))
        assert scaled.tolist() == [6.0, 6.0] and float(one_more) == 3.0
    assert len(made) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda values: [values if values.sum() > 0 else -values],
        lambda values: [values * values[0].item()],
        lambda values: [values[values > 0]],
        lambda values: [values + torch.rand(3)],
        lambda values: [values if torch.equal(values, values) else -values],
        lambda values: [values * float(values.numpy()[0])],
        lambda values: [values * float(np.array(values * 2.0)[0])],
        lambda values: [values * values.tolist()[0]],
        lambda values: [values * float(keras.ops.convert_to_numpy(values)[0])],
    ],
    ids=["branch", "number", "shape", "random", "equal", "numpy", "array", "list", "keras"],
)
def test_what_depends_on_values_is_refused(function):
    with pytest.raises(NotRepeatable):
        repeated(function, torch.ones(3))


def test_a_recording_does_not_write_to_what_is_not_the_models():
    counter = torch.zeros(())
    with pytest.raises(NotRepeatable, match="does not own"):
        repeated(lambda values: [counter.add_(1.0) * values], torch.ones(3))
    assert float(counter) == 0.0


def test_a_loop_over_known_numbers_is_not_refused():
    def every_other(values):
        positions = torch.tensor(1) * 2
        return [values[int(positions) :]]

    assert repeated(every_other, torch.arange(3.0))(torch.arange(3.0, 6.0))[0].tolist() == [5.0]
