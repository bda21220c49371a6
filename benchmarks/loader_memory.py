"""What the loader keeps in memory: with a folder of very many files, and epoch after epoch.

    python benchmarks/loader_memory.py --data FOLDER --files 200000 --epochs 20

Writes that many tiny images into a temporary folder, lists them and loads from them; then goes through FOLDER for so many epochs.
Resident memory in MiB above that of the process before; no backend is imported.
"""

import argparse
import io
import json
import resource
import tempfile
import time
from pathlib import Path

from PIL import Image

from kvq.data import iterate, open_source, training_batches, training_transforms


def resident() -> float:
    """MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def many_files(count: int) -> dict[str, float]:
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "png")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            path = Path(folder) / f"{number % 1000:03d}" / f"photograph_{number:012d}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content.getvalue())
        before, started = resident(), time.perf_counter()
        source = open_source(folder, "train")
        listed = time.perf_counter() - started
        listing = resident() - before
        batches = iterate(training_batches(source, training_transforms(0, 16, True), 64, 0))
        for _ in range(200):
            next(batches)
        return {"files": len(source), "seconds_to_list": listed, "mib_listed": listing, "mib_loading": resident() - before}


def epochs(data: Path, count: int) -> dict[str, object]:
    source = open_source(str(data), "all")
    batches = iterate(training_batches(source, training_transforms(0, 128, True), 16, 0))
    seen = []
    for _ in range(count):
        for _ in range(-(-len(source) // 16)):
            next(batches)
        seen.append(round(resident(), 1))
    return {"mib_after_each_epoch": seen, "last_over_second": seen[-1] / seen[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    print(json.dumps({**epochs(arguments.data, arguments.epochs), **many_files(arguments.files)}, indent=1))


if __name__ == "__main__":
    main()
