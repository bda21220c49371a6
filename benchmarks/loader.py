"""How fast photographs become training batches: decode, random crop of 128, random flip, uint8 batches of 16.

    python benchmarks/loader.py --data FOLDER --cores 1 2 --rounds 5

kvq from the folder, from `kvq data pack`, from `kvq data pack --size 160`; a loop of simplejpeg (the bare decoder) and one of
Pillow; the original replication's tf.data pipeline (16 parallel calls of `decode_image` and `random_crop`), the same with
`decode_and_crop_jpeg`; torch's DataLoader with two workers and Pillow. Each is a process of its own with its pipeline; they take
turns, once each in a round. Images per second are medians over rounds, ratios are medians of each round's ratio to the original's
form. All are held to the same cores. What is not installed is left out.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CROP, BATCH = 128, 16
ORIGINAL = "tf.data, original"


def kvq_batches(path: Path) -> Iterator[Any]:
    from kvq.data import iterate, open_source, training_batches, training_transforms

    source = open_source(str(path), "all")
    threads = len(os.sched_getaffinity(0))
    return (
        batch["images"]
        for batch in iterate(training_batches(source, training_transforms(0, CROP, True), BATCH, 0), threads=threads)
    )


def loop(decode: Any) -> Any:
    """A plain loop around a decoder of one file, on one thread."""

    def batches(path: Path) -> Iterator[Any]:
        files = photographs(path)
        while True:
            yield np.stack([cropped(decode(file)) for file in random.sample(files, BATCH)])

    return batches


def cropped(image: np.ndarray) -> np.ndarray:
    top, left = (random.randint(0, side - CROP) for side in image.shape[:2])
    square = image[top : top + CROP, left : left + CROP]
    return square[:, ::-1] if random.random() < 0.5 else square


def by_simplejpeg(file: str) -> np.ndarray:
    import simplejpeg

    return simplejpeg.decode_jpeg(Path(file).read_bytes())


def by_pillow(file: str) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def tf_batches(partly: bool) -> Any:
    def batches(path: Path) -> Iterator[Any]:
        import tensorflow as tf

        cores = len(os.sched_getaffinity(0))
        tf.config.threading.set_intra_op_parallelism_threads(cores)
        tf.config.threading.set_inter_op_parallelism_threads(cores)

        def whole(file: Any) -> Any:
            image = tf.io.decode_image(tf.io.read_file(file), channels=3, expand_animations=False)
            return tf.image.random_flip_left_right(tf.image.random_crop(image, (CROP, CROP, 3)))

        def window(file: Any) -> Any:
            content = tf.io.read_file(file)
            height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(content))
            top = tf.random.uniform((), 0, height - CROP + 1, tf.int32)
            left = tf.random.uniform((), 0, width - CROP + 1, tf.int32)
            image = tf.io.decode_and_crop_jpeg(content, (top, left, CROP, CROP), channels=3)
            return tf.image.random_flip_left_right(tf.reshape(image, (CROP, CROP, 3)))

        files = photographs(path)
        dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
        return iter(dataset.map(window if partly else whole, num_parallel_calls=16).batch(BATCH).prefetch(2))

    return batches


def torch_batches(path: Path) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    return iter(DataLoader(Photographs(photographs(path)), BATCH, num_workers=2))


class Photographs:
    """What torch calls a dataset: endless enough."""

    def __init__(self, files: list[str]):
        self.files = files

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(cropped(by_pillow(self.files[index % len(self.files)])))


def photographs(path: Path) -> list[str]:
    return sorted(str(file) for file in path.iterdir())


VARIANTS = {
    ORIGINAL: tf_batches(partly=False),
    "tf.data, decode_and_crop_jpeg": tf_batches(partly=True),
    "torch DataLoader, 2 workers, Pillow": torch_batches,
    "Pillow in a loop": loop(by_pillow),
    "simplejpeg in a loop": loop(by_simplejpeg),
    "kvq, folder": kvq_batches,
    "kvq, packed": kvq_batches,
    "kvq, packed --size 160": kvq_batches,
}
FOLDERS = {"kvq, packed": "packed", "kvq, packed --size 160": "packed160"}


def work(name: str, path: Path, batches: int) -> None:
    """In a process of its own: a round for each line that comes, its seconds as a line back."""
    pipeline = VARIANTS[name](path)
    for _ in range(batches):
        next(pipeline)
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        for batch in itertools.islice(pipeline, batches):
            assert batch.shape == (BATCH, CROP, CROP, 3)
        print(time.perf_counter() - started, flush=True)


def measure(folder: Path, cores: int, rounds: int, batches: int) -> dict[str, list[float]]:
    """Seconds of each round of each variant that is installed."""
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    workers = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--work", name, "--data", str(folder / FOLDERS.get(name, "photographs"))]
        process = subprocess.Popen(
            [*command, "--batches", str(batches)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),
            env={**os.environ, "OMP_NUM_THREADS": str(cores)},
        )
        assert process.stdout is not None
        if process.stdout.readline() == "ready\n":
            workers[name] = process
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, process in workers.items():
            time.sleep(0.3)  # for threads that read ahead to fill their buffers
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds[name].append(float(process.stdout.readline()))
    for process in workers.values():
        process.kill()
    return seconds


def main() -> None:
    arguments = _arguments()
    if arguments.work:
        work(arguments.work, arguments.data, arguments.batches)
        return
    from kvq.data import FolderSource, pack
    from kvq.data.listing import list_images

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "photographs").mkdir()
        source = FolderSource(arguments.data, list_images(arguments.data))
        for name in source.names:
            # The peers take neither other formats nor images below the crop.
            if name.lower().endswith((".jpg", ".jpeg")) and min(by_pillow(str(arguments.data / name)).shape[:2]) >= CROP:
                (folder / "photographs" / Path(name).name).symlink_to((arguments.data / name).resolve())
        pack(folder / "photographs", folder / "packed")
        pack(folder / "photographs", folder / "packed160", size=160)
        results = {cores: measure(folder, cores, arguments.rounds, arguments.batches) for cores in arguments.cores}
    images = BATCH * arguments.batches
    table = {
        cores: {
            name: {
                "images_per_second": images / statistics.median(each),
                "ratio": statistics.median(o / s for o, s in zip(seconds[ORIGINAL], each, strict=True))
                if ORIGINAL in seconds
                else None,
            }
            for name, each in seconds.items()
        }
        for cores, seconds in results.items()
    }
    if arguments.json:
        print(json.dumps(table))
        return
    heads = [f"{cores} core{'s' * (cores > 1)}: images/s | of the original's" for cores in table]
    print("| pipeline |", " | ".join(heads), "|")
    print("|---" * (1 + 2 * len(table)) + "|")
    for name in next(iter(table.values())):
        cells = [
            f"{row[name]['images_per_second']:.0f} | {row[name]['ratio']:.2f}x" if row[name]["ratio"] else "- | -"
            for row in table.values()
        ]
        print(f"| {name} |", " | ".join(cells), "|")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs, JPEG")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=40, help="of 16 images, a round of one pipeline")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
