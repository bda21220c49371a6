"""Checkpoints hold the whole training state: what resumes from one goes on as if it had never stopped, bit for bit."""

import json
import shutil

import keras
import numpy as np
import pytest

from kvq import checkpoint, load_config
from kvq.checkpoint import read_checkpoint
from kvq.errors import RunError
from kvq.model import VQVAE
from kvq.optimizer import FiniteSteps
from kvq.quantizers import EMAVectorQuantizer, VectorQuantizer
from kvq.run import Run

BATCHES = np.random.default_rng(0).integers(0, 256, (8, 4, 8, 8, 1), np.uint8)


def build(quantizer=None, seed=0, codes=5, dim=4):
    """A small model with all that a state can have: an optimizer with slots and a schedule, and a layer that draws numbers."""
    keras.utils.set_random_seed(seed)
    images, codes_in = keras.Input((None, None, 1), name="images"), keras.Input((None, None, dim), name="codes")
    latents = keras.layers.Conv2D(dim, 4, 4, name="down_conv")(keras.layers.Dropout(0.3, seed=seed, name="dropout")(images))
    up = keras.layers.Conv2DTranspose(1, 4, 4, activation="tanh", name="up_conv")
    model = VQVAE(
        keras.Model(images, latents, name="encoder"),
        quantizer or VectorQuantizer(codes, name="quantizer"),
        keras.Model(codes_in, up(codes_in), name="decoder"),
    )
    model.build((None, None, None, 1))
    schedule = keras.optimizers.schedules.CosineDecay(0.0, 20, warmup_target=0.05, warmup_steps=3)
    model.compile(optimizer=FiniteSteps(keras.optimizers.Adam(schedule, use_ema=True)))
    return model


def train(model, batches):
    for batch in batches:
        model.train_on_batch(batch)


def state(model):
    """Everything that the next step depends on, in an order that does not change."""
    seeds = [generator.state for layer in model._flatten_layers() for generator in layer._seed_generators]
    return [np.array(keras.ops.convert_to_numpy(value)) for value in [*model.weights, *model.optimizer.variables, *seeds]]


def assert_same_state(one, other):
    for first, second in zip(state(one), state(other), strict=True):
        np.testing.assert_array_equal(first, second)


def nothing(text):
    raise AssertionError(f"Nothing was to be noted: {text}")


def save(run, model, step, keep, validation_psnr=None):
    return checkpoint.save_checkpoint(run, model, step, keep, {"train": {"steps": 8}}, validation_psnr)


def restore(run, model, note):
    whole = read_checkpoint(run, note)
    whole.restore(model)
    return whole.step


def steps(run):
    return sorted(int(path.name.removeprefix("step_")) for path in run.checkpoints.iterdir())


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.create(load_config("fashion_mnist_mini"), {})
    return run


@pytest.fixture(scope="module")
def trained():
    model = build()
    train(model, BATCHES[:3])
    return model


@pytest.fixture(scope="module")
def untrained():
    """Another start, to restore into."""
    return build(seed=1)


def test_restoring_brings_back_weights_slots_iterations_and_seeds(run, trained, untrained):
    folder = save(run, trained, 3, keep=2)
    assert folder == run.checkpoints / "step_00000003" and folder.is_dir()
    assert any((a != b).any() for a, b in zip(trained.get_weights(), untrained.get_weights(), strict=True))
    assert restore(run, untrained, nothing) == 3
    assert_same_state(trained, untrained)
    assert int(keras.ops.convert_to_numpy(untrained.optimizer.iterations)) == 3
    assert read_checkpoint(run, nothing).config == {"train": {"steps": 8}}


def test_state_holds_each_variable_once_under_a_name_that_does_not_count_on(run, trained, untrained):
    states = [dict(checkpoint._state(model)) for model in (trained, untrained)]
    assert states[0].keys() == states[1].keys()
    assert {name for name in states[0] if name.startswith("seed.")} == {"seed.0000"}
    assert "optimizer.0000" in states[0] and "encoder.down.conv.kernel" in states[0]
    # Two slots for each trained variable, besides iterations and learning rate or what else is counted.
    slots = [name for name in states[0] if name.startswith("optimizer.")]
    assert len(slots) >= 1 + 2 * len(trained.trainable_variables)


def test_four_steps_and_four_more_equal_eight_bit_for_bit(run, quantizer_kind, make_quantizer):
    straight, first, second = (build(make_quantizer(quantizer_kind, 4), seed) for seed in (0, 0, 1))
    train(straight, BATCHES)
    train(first, BATCHES[:4])
    save(run, first, 4, keep=2)
    assert restore(run, second, nothing) == 4
    train(second, BATCHES[4:])
    assert_same_state(straight, second)
    # Had the state not moved in the last steps, a resume that does nothing would pass as well.
    assert any((one != other).any() for one, other in zip(state(first), state(second), strict=True))


def test_saving_changes_nothing(run, trained):
    before = state(trained)
    save(run, trained, 3, keep=2)
    for one, other in zip(before, state(trained), strict=True):
        np.testing.assert_array_equal(one, other)


# Broken ones.


def cut(folder):
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def change_a_byte(folder):
    content = bytearray((folder / "state.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "state.safetensors").write_bytes(content)


def empty_the_state(folder):
    (folder / "state.safetensors").write_bytes(b"")


def remove_the_state(folder):
    (folder / "state.safetensors").unlink()


def remove_the_description(folder):
    (folder / "state.json").unlink()


def cut_the_description(folder):
    (folder / "state.json").write_text('{"format_ver')


def make_the_description_a_list(folder):
    (folder / "state.json").write_text("[1]")


def empty_the_description(folder):
    (folder / "state.json").write_text("{}")


def make_it_newer(folder):
    description = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**description, "format_version": 99}))


BREAKAGES = [
    *(cut, change_a_byte, empty_the_state, remove_the_state, remove_the_description, cut_the_description),
    *(make_the_description_a_list, empty_the_description, make_it_newer),
]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory, trained):
    """A run with the same state at steps 3 and 4."""
    run = Run(tmp_path_factory.mktemp("checkpoints") / "run")
    run.create(load_config("fashion_mnist_mini"), {})
    for step in (3, 4):
        save(run, trained, step, keep=5)
    return run


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda function: function.__name__)
def test_broken_checkpoint_is_passed_over_with_a_note(two_checkpoints, tmp_path, trained, untrained, breakage):
    run = Run(shutil.copytree(two_checkpoints.folder, tmp_path / "run"))
    breakage(run.checkpoints / "step_00000004")
    notes = []
    assert restore(run, untrained, notes.append) == 3
    assert len(notes) == 1 and "step_00000004 is broken" in notes[0] and "the one before it is taken" in notes[0]
    assert_same_state(trained, untrained)
    # Nor does it stop the next one from being saved.
    save(run, trained, 4, keep=1, validation_psnr=20.0)
    assert restore(run, untrained, nothing) == 4


def test_no_whole_checkpoint_is_an_error_with_a_way_out(run, trained, untrained):
    with pytest.raises(RunError, match="holds no whole checkpoint to resume from. Give --overwrite to start again."):
        restore(run, untrained, nothing)
    cut(save(run, trained, 3, keep=1))
    notes = []
    with pytest.raises(RunError, match="holds no whole checkpoint"):
        restore(run, untrained, notes.append)
    assert len(notes) == 1


@pytest.mark.parametrize("changes", [{"codes": 6}, {"dim": 5}, {"quantizer": EMAVectorQuantizer(5, name="quantizer")}], ids=str)
def test_checkpoint_of_another_model_is_refused_and_nothing_is_assigned(run, trained, changes):
    save(run, trained, 3, keep=1)
    other = build(**changes)
    before = other.get_weights()
    with pytest.raises(RunError, match="is of another model than the configuration"):
        restore(run, other, nothing)
    for one, another in zip(before, other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, another)


def test_interrupted_save_leaves_the_checkpoints_as_they_were(run, trained, untrained, monkeypatch):
    save(run, trained, 3, keep=1)

    def stop(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_text", stop)
    for step in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            save(run, trained, step, keep=1)
    monkeypatch.undo()
    assert steps(run) == [3]
    assert restore(run, untrained, nothing) == 3


# Which stay.


def test_newest_and_best_stay(run, trained):
    for step, psnr in [(1, 18.0), (2, 21.0), (3, None), (4, 20.0), (5, None)]:
        save(run, trained, step, keep=2, validation_psnr=psnr)
    assert steps(run) == [2, 4, 5]
    save(run, trained, 6, keep=2, validation_psnr=22.0)
    assert steps(run) == [5, 6]
    save(run, trained, 7, keep=1)
    assert steps(run) == [6, 7]


def test_newest_stay_where_nothing_was_measured(run, trained):
    for step in (1, 2, 3):
        save(run, trained, step, keep=2)
    assert steps(run) == [2, 3]


def test_newest_is_so_by_number_not_by_name(run, trained, untrained):
    """Steps may have nine digits and more, where the names have eight."""
    for step in (99_999_999, 100_000_000):
        save(run, trained, step, keep=1)
    assert steps(run) == [100_000_000]
    assert restore(run, untrained, nothing) == 100_000_000


def test_broken_description_does_not_stop_the_next_save(run, trained):
    make_the_description_a_list(save(run, trained, 1, keep=3, validation_psnr=20.0))
    save(run, trained, 2, keep=3, validation_psnr=19.0)
    assert steps(run) == [1, 2]


def test_what_else_lies_there_is_left_alone(run, trained):
    (run.checkpoints / "notes.txt").write_text("mine")
    (run.checkpoints / "step_by_step").write_text("mine, too")
    save(run, trained, 1, keep=1)
    assert (run.checkpoints / "notes.txt").exists() and (run.checkpoints / "step_by_step").exists()
