"""Checkpoints hold the whole training state: what resumes from one goes on as if it had never stopped, bit for bit."""

import hashlib
import json
import os
import shutil

import keras
import numpy as np
import pytest
from safetensors.numpy import load
from safetensors.numpy import save as to_bytes

from kvq import checkpoint, load_config
from kvq.checkpoint import newest_checkpoint, restore_checkpoint
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
    return checkpoint.save_checkpoint(run, model, step, keep, {"train": {"steps": 8}}, validation_psnr, lambda folder, step: None)


def restore(run, model, note):
    return restore_checkpoint(run, model, note).step


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
    assert newest_checkpoint(run).config == {"train": {"steps": 8}}


def test_state_holds_each_variable_once_under_a_name_that_does_not_count_on(run, trained, untrained):
    states = [dict(checkpoint._state(model)) for model in (trained, untrained)]
    assert states[0].keys() == states[1].keys()
    assert {name for name in states[0] if name.startswith("seed.")} == {"seed.0000"}
    assert "optimizer.0000" in states[0] and "encoder.down.conv.kernel" in states[0]
    # Two slots for each trained variable, besides iterations and learning rate or what else is counted.
    slots = [name for name in states[0] if name.startswith("optimizer.")]
    assert len(slots) >= 1 + 2 * len(trained.trainable_variables)


def test_four_steps_and_four_more_equal_eight_bit_for_bit(run, quantizer_kind, make_quantizer):
    straight, second = (build(make_quantizer(quantizer_kind, 4), seed) for seed in (0, 1))
    train(straight, BATCHES[:4])
    save(run, straight, 4, keep=2)  # which changes nothing, see below
    halfway = state(straight)
    train(straight, BATCHES[4:])
    assert restore(run, second, nothing) == 4
    train(second, BATCHES[4:])
    assert_same_state(straight, second)
    # Had the state not moved in the last steps, a resume that does nothing would pass as well.
    assert any((one != other).any() for one, other in zip(halfway, state(second), strict=True))


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


def describe(**changes):
    """Damage to what state.json says."""

    def damage(folder):
        description = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**description, **changes}))

    return damage


def text_of_the_description(text):
    return lambda folder: (folder / "state.json").write_text(text)


def hold(change):
    """Damage to the arrays, in a file whose checksum holds."""

    def damage(folder):
        content = to_bytes(change(load((folder / "state.safetensors").read_bytes())))
        (folder / "state.safetensors").write_bytes(content)
        describe(sha256=hashlib.sha256(content).hexdigest())(folder)

    return damage


def with_a_weight(value):
    def change(arrays):
        arrays["quantizer.codebook"] = arrays["quantizer.codebook"].copy()
        arrays["quantizer.codebook"][1, 2] = value
        return arrays

    return hold(change)


def instead(name, put):
    def damage(folder):
        moved = (folder / name).rename(folder.parent.parent / "moved")
        put(folder / name, moved)

    return damage


def make_it_a_link(folder):
    folder.symlink_to(folder.rename(folder.parent.parent / "moved"), target_is_directory=True)


BREAKAGES = {
    **{function.__name__: function for function in (cut, change_a_byte, empty_the_state, remove_the_state)},
    **{function.__name__: function for function in (remove_the_description, cut_the_description)},
    **{function.__name__: function for function in (make_the_description_a_list, empty_the_description)},
    "deep description": text_of_the_description("[" * 100_000),
    "description of 5,000 digits": text_of_the_description("9" * 5000),
    "description that is huge": text_of_the_description(" " * 2**17),
    "description of a terabyte": lambda folder: os.truncate(folder / "state.json", 2**40),
    "description of text for a version": describe(format_version="1"),
    "description of true for a version": describe(format_version=True),
    "description of another step": describe(step=5),
    "description of no step": describe(step=None),
    "description of no checksum": describe(sha256=None),
    "weight that is not a number": with_a_weight(np.nan),
    "weight that is infinite": with_a_weight(np.inf),
    **{
        f"{name} is a {what}": instead(name, put)
        for name in ("state.json", "state.safetensors")
        for what, put in [
            ("link", lambda path, moved: path.symlink_to(moved)),
            ("folder", lambda path, moved: path.mkdir()),
            ("pipe", lambda path, moved: os.mkfifo(path)),
        ]
    },
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory, trained):
    """A run with the same state at steps 3 and 4."""
    run = Run(tmp_path_factory.mktemp("checkpoints") / "run")
    run.create(load_config("fashion_mnist_mini"), {})
    for step in (3, 4):
        save(run, trained, step, keep=5)
    return run


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_checkpoint_is_passed_over_with_a_note(two_checkpoints, tmp_path, trained, untrained, breakage):
    run = Run(shutil.copytree(two_checkpoints.folder, tmp_path / "run"))
    BREAKAGES[breakage](run.checkpoints / "step_00000004")
    notes = []
    assert restore(run, untrained, notes.append) == 3
    assert len(notes) == 1 and "step_00000004 is broken" in notes[0] and "the one before it is taken" in notes[0]
    assert_same_state(trained, untrained)
    # Nor does it stop the next one from being saved.
    save(run, trained, 4, keep=1, validation_psnr=20.0)
    assert restore(run, untrained, nothing) == 4


def test_what_is_saved_below_a_broken_checkpoint_stays(two_checkpoints, tmp_path, trained, untrained):
    run = Run(shutil.copytree(two_checkpoints.folder, tmp_path / "run"))
    broken = (run.checkpoints / "step_00000004").rename(run.checkpoints / "step_00000009")
    cut(broken)
    save(run, trained, 6, keep=1)
    assert steps(run) == [6, 9] and restore(run, untrained, lambda text: None) == 6


def test_what_a_killed_process_left_of_a_checkpoint_is_removed(two_checkpoints, tmp_path, untrained):
    run = Run(shutil.copytree(two_checkpoints.folder, tmp_path / "run"))
    shutil.copytree(run.checkpoints / "step_00000004", run.checkpoints / ".step_00000005.abcd")
    # One that was being replaced has stepped aside, and comes back.
    (aside := run.checkpoints / ".step_00000004.old.efgh").mkdir()
    (run.checkpoints / "step_00000004").rename(aside / "step_00000004")
    assert restore(run, untrained, nothing) == 4 and steps(run) == [3, 4]


@pytest.mark.parametrize("version", [2, 99, 10**4000])
def test_checkpoint_of_a_newer_kvq_is_refused_by_name(two_checkpoints, tmp_path, untrained, version):
    """Not passed over: the one before it may be a week older."""
    run = Run(shutil.copytree(two_checkpoints.folder, tmp_path / "run"))
    describe(format_version=version)(run.checkpoints / "step_00000004")
    with pytest.raises(RunError, match="step_00000004 was written by a newer kvq"):
        restore(run, untrained, nothing)


def test_links_to_checkpoints_are_neither_loaded_nor_removed(two_checkpoints, tmp_path, trained, untrained):
    run = Run(shutil.copytree(two_checkpoints.folder, tmp_path / "run"))
    make_it_a_link(run.checkpoints / "step_00000004")
    assert restore(run, untrained, nothing) == 3
    (run.checkpoints / "step_00000002").symlink_to(tmp_path)
    save(run, trained, 5, keep=1)
    assert (run.checkpoints / "step_00000002").is_symlink() and len([*(run.folder / "moved").iterdir()]) == 2
    make_it_a_link(run.checkpoints)
    with pytest.raises(RunError, match="holds no whole checkpoint"):
        restore(run, untrained, nothing)


@pytest.mark.parametrize("psnr", ["high", [1], True, float("nan"), {}])
def test_description_of_another_kind_of_psnr_does_not_stop_the_next_save(run, trained, psnr):
    describe(validation_psnr=psnr)(save(run, trained, 1, keep=3, validation_psnr=20.0))
    for step in (2, 3, 4):
        save(run, trained, step, keep=1, validation_psnr=19.0 if step == 2 else None)
    assert steps(run) == [2, 4]


def test_no_whole_checkpoint_is_an_error_with_a_way_out(run, trained, untrained):
    with pytest.raises(RunError, match="holds no whole checkpoint to resume from. Give --overwrite to start again."):
        restore(run, untrained, nothing)
    cut(save(run, trained, 3, keep=1))
    notes = []
    with pytest.raises(RunError, match="holds no whole checkpoint"):
        restore(run, untrained, notes.append)
    assert len(notes) == 1


OTHERS = [{"codes": 6}, {"dim": 5}, {"quantizer": EMAVectorQuantizer(5, name="quantizer")}]


def integer_codes(arrays):
    return {**arrays, "quantizer.codebook": arrays["quantizer.codebook"].astype("int32")}


def renamed_codes(arrays):
    arrays["../../codebook"] = arrays.pop("quantizer.codebook")
    return arrays


def a_terabyte(folder):
    os.truncate(folder / "state.safetensors", 2**40)


@pytest.mark.parametrize("damage", [hold(integer_codes), hold(renamed_codes), a_terabyte], ids=["integers", "names", "terabyte"])
def test_state_of_other_tensors_is_refused_and_nothing_is_assigned(run, trained, untrained, damage):
    damage(save(run, trained, 3, keep=1))
    before = untrained.get_weights()
    with pytest.raises(RunError, match="is of another model than the configuration"):
        restore(run, untrained, nothing)
    for one, another in zip(before, untrained.get_weights(), strict=True):
        np.testing.assert_array_equal(one, another)


def other_sums(arrays):
    return {name: array for name, array in arrays.items() if not name.startswith("metric.")} | {
        "metric.0000": np.array(7, "float32")
    }


def test_sums_of_a_kvq_that_measured_otherwise_are_left_out_with_a_note(run, trained, untrained):
    hold(other_sums)(save(run, trained, 3, keep=1))
    before = [np.array(keras.ops.convert_to_numpy(variable)) for variable in untrained.metrics_variables]
    notes = []
    assert restore(run, untrained, notes.append) == 3
    assert len(notes) == 1 and "measured otherwise" in notes[0]
    assert_same_state(trained, untrained)
    for one, another in zip(before, untrained.metrics_variables, strict=True):
        np.testing.assert_array_equal(one, keras.ops.convert_to_numpy(another))


@pytest.mark.parametrize("changes", OTHERS, ids=str)
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
    (run.checkpoints / "step_\u00b2").mkdir()  # a digit to Python, and no number
    save(run, trained, 1, keep=1)
    assert (run.checkpoints / "notes.txt").exists() and (run.checkpoints / "step_by_step").exists()
