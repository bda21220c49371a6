"""How fast `kvq encode` is beside what bounds it, and how many bytes a token takes.

    python benchmarks/encode.py --backend tensorflow --data PHOTOGRAPHS --json

Arrays: the network of `cifar10` on 32x32 images. kvq's side is what `kvq encode` does with a shard: cut batches out of the
array, prepare and encode them, write and flush the files. Beside it bare `model.predict` of the same encoder and quantizer on
prepared images in memory. They take turns in one process; the ratio is the median of each round's, with its quartiles.

Photographs: the network of `mscoco` on crops of the JPEG files in `--data` (or $KVQ_DATA/mscoco; left out without either), once
of 128 pixels, where encoding takes most of the time, and once of 16, where decoding does. Three kinds of rounds take turns: files
only decoded and cropped; crops in memory only encoded; and kvq's side, as above. Where both compete for the same processors, kvq
can at best take the sum of both times; where the model has a device of its own, the longer.

Weights are random: no image takes longer or shorter for it. What is written goes to a temporary folder.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 64


def main() -> None:
    arguments = _arguments()
    from kvq import backends

    backend = backends.choose(arguments.backend)
    with tempfile.TemporaryDirectory() as scratch:
        result = {
            "backend": f"{backend} {version(backends.distributions(backend)[0])}",
            "devices": backends.devices(backend),
            "processor": f"{backends.cpus()} of {platform.machine()}",
            "arrays": arrays(Path(scratch), arguments.rounds, arguments.images),
            "bytes_per_token": bytes_per_token(Path(scratch)),
        }
        data = arguments.data or (Path(os.environ["KVQ_DATA"]) / "mscoco" if os.environ.get("KVQ_DATA") else None)
        if data and data.is_dir():
            for crop in (128, 16):
                result[f"photographs_{crop}"] = photographs(Path(scratch), data, crop, arguments.rounds, arguments.photographs)
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        if not isinstance(value, dict):
            print(f"{name}: {value}")
            continue
        for part, figure in value.items():
            print(f"{name}, {part.replace('_', ' ')}: {figure}")


def arrays(folder: Path, rounds: int, images: int) -> dict[str, Any]:
    """kvq beside `model.predict` on arrays."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), np.uint8)
    np.savez(folder / "cifar.npz", x_train=pixels)
    tokenizer, kvq = _job("cifar10", folder / "cifar10", folder / "cifar.npz", images)
    seconds = _in_turn({"kvq": kvq, "predict": lambda: tokenizer._encoder.predict(pixels, batch_size=BATCH, verbose=0)}, rounds)
    return {
        **{f"{name}_images_per_second": _median_rate(each, images) for name, each in seconds.items()},
        "ratio_to_predict": _quartiles([p / k for p, k in zip(seconds["predict"], seconds["kvq"], strict=True)]),
    }


def photographs(folder: Path, data: Path, crop: int, rounds: int, images: int) -> dict[str, Any]:
    """kvq beside decoding alone and encoding alone."""
    from kvq.data import evaluation_batches, evaluation_transforms, iterate, open_source

    source = open_source(str(data), "all")
    tokenizer, kvq = _job("mscoco", folder / f"mscoco{crop}", data, images, "all", [f"data.crop={crop}"])
    batches = evaluation_batches(source, evaluation_transforms(0, crop), BATCH, limit=images)
    crops = np.concatenate([batch["images"] for batch in iterate(batches)])
    rounds_of = {"kvq": kvq, "decoding": lambda: list(iterate(batches)), "encoding": lambda: tokenizer.encode(crops, BATCH)}
    seconds = _in_turn(rounds_of, rounds)
    together = list(zip(seconds["kvq"], seconds["decoding"], seconds["encoding"], strict=True))
    return {
        "images": len(crops),
        **{f"{name}_images_per_second": _median_rate(each, len(crops)) for name, each in seconds.items()},
        "ratio_to_one_after_the_other": _quartiles([(d + e) / k for k, d, e in together]),
        "ratio_to_the_slower_alone": _quartiles([max(d, e) / k for k, d, e in together]),
    }


def bytes_per_token(folder: Path) -> dict[str, float]:
    """Of a set of 10,000 grids of 8x8 with a vocabulary of 256, in files of 4,096: tokens and tokens.json; labels; names."""
    from kvq.data.token_set import DTYPES, Preprocessing, TokenPlan, TokenSetSource
    from kvq.tokens import shards

    count = 10_000
    plan = TokenPlan(
        kvq_version=version("kvq"),
        weights_sha256="0" * 64,
        backend="none",
        quantizer={"kind": "ema_vector", "codebook_size": 256},
        vocabulary=256,
        grid=[8, 8],
        depth=None,
        dtype="uint8",
        preprocessing=Preprocessing(channels=3, resize=None, pad=0, crop=32),
        source=TokenSetSource(name="noise", split="train", images=count, sha256="0" * 64),
        batch_size=BATCH,
        shard_size=4096,
    )
    out, rng = folder / "set", np.random.default_rng(0)
    shards.begin(out, plan)
    for number in shards.numbers(plan):
        size = min(plan.shard_size, count - number * plan.shard_size)
        tokens = rng.integers(0, 256, (size, *plan.shape)).astype(DTYPES[plan.dtype])
        names = [f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i:05d}.JPEG" for i in range(size)]
        shards.write_shard(out, plan, number, tokens, np.arange(size) % 1000, names, [])
    shards.join(out, plan)
    size_of = {part: sum(file.stat().st_size for file in out.glob(f"{part}*")) for part in ("tokens", "labels", "names")}
    return {part: round(size / (count * 64), 4) for part, size in size_of.items()}


def _job(
    config_name: str, folder: Path, data: Path, shard_size: int, split: str = "train", changes: Sequence[str] = ()
) -> tuple[Any, Callable[[], Any]]:
    """A model of a shipped configuration, and what `kvq encode` does with a shard of `data`."""
    import keras

    from kvq import Tokenizer, load_config
    from kvq.artifact import save
    from kvq.build import build_model
    from kvq.data import open_source
    from kvq.tokens import shards
    from kvq.tokens.engines import encode_shard
    from kvq.tokens.plan import plan_of

    config = load_config(config_name, changes)
    keras.utils.set_random_seed(0)
    save(build_model(config.model, config.quantizer, config.loss, 3), config, 3, config_name, "train", 0, folder)
    tokenizer, source = Tokenizer.load(folder), open_source(str(data), split)
    plan = plan_of(tokenizer.config, source, BATCH, shard_size)
    shards.begin(folder / "set", plan)
    return tokenizer, lambda: encode_shard(tokenizer, source, folder / "set", plan, 0, lambda images: None)


def _in_turn(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one that compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _median_rate(seconds: list[float], images: int) -> float:
    return round(images / statistics.median(seconds), 1)


def _quartiles(values: list[float]) -> list[float]:
    return [round(value, 3) for value in statistics.quantiles(values, n=4, method="inclusive")]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", help="jax, tensorflow or torch")
    parser.add_argument("--data", type=Path, help="a folder of photographs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=1024, help="arrays of a round")
    parser.add_argument("--photographs", type=int, default=128, help="of a round")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
