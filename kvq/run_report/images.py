"""The pictures of a run as data: addresses, few enough and small enough for one page."""

import base64
import io
import os
import re
import stat
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from kvq.run import Run
from kvq.untrusted import read_bytes

MOST_STEPS = 20  # whose grids a page has, of each split, over all its runs
LARGE = 150_000  # bytes of a PNG, from which on it becomes a JPEG
LONGEST_SIDE = 2000  # pixels of such a JPEG
_PNG = b"\x89PNG\r\n\x1a\n"
_FILE = 2**27  # bytes
_PIXELS = 2**26
_NAME = re.compile(r"(train|validation)_(\d{8,12})\.png")


class Pictures:
    """Reads the pictures of a run.

    Args:
        run: The run.
        of: How many runs the page shows.

    Attributes:
        notes: What could not be read, in sentences.
        remarks: What is not shown as it lies in the folder, in sentences.
    """

    def __init__(self, run: Run, of: int = 1):
        self.run = run
        self.most = max(2, MOST_STEPS // of)
        self.notes: list[str] = []
        self.remarks: list[str] = []

    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """Split to `step` and `address` of each grid, from the first step to the last."""
        steps = self._steps()
        chosen = {split: _spread(sorted(all_steps), self.most) for split, all_steps in steps.items()}
        for split, all_steps in steps.items():
            if len(chosen[split]) < len(all_steps):
                self.remarks.append(
                    f"{len(chosen[split])} of the {len(all_steps)} grids of {split} images are shown, evenly spread."
                )
        wanted = [(split, step) for split, of_split in chosen.items() for step in of_split]
        with ThreadPoolExecutor(4) as pool:  # Pillow works without the interpreter's lock
            read = list(pool.map(lambda item: _address(self.run.samples / steps[item[0]][item[1]]), wanted))
        samples: dict[str, list[dict[str, Any]]] = {"validation": [], "train": []}
        for (split, step), (address, problem, _) in zip(wanted, read, strict=True):
            if address:
                samples[split].append({"step": step, "address": address})
            else:
                self.notes.append(f"samples/{steps[split][step]} cannot be shown: {problem}.")
        if smaller := sum(made_smaller for _, _, made_smaller in read):
            self.remarks.append(
                f"{smaller} grids of more than {LARGE // 1000} kB are shown as JPEG of at most {LONGEST_SIDE} pixels a side; "
                "those in the folder samples are exact."
            )
        return samples

    def atlas(self) -> str | None:
        """codebook.png, where there is one."""
        if not os.path.lexists(self.run.codebook_plot):
            return None
        address, problem, _ = _address(self.run.codebook_plot, exact=True)
        if problem:
            self.notes.append(f"codebook.png cannot be shown: {problem}.")
        return address

    def _steps(self) -> dict[str, dict[int, str]]:
        """Split to step to the name of the file."""
        steps: dict[str, dict[int, str]] = {"validation": {}, "train": {}}
        try:
            if not stat.S_ISDIR(os.lstat(self.run.samples).st_mode):
                raise NotADirectoryError(0, "it is a link or no folder")
            for name in os.listdir(self.run.samples):
                if match := _NAME.fullmatch(name):
                    steps[match[1]][int(match[2])] = name
        except FileNotFoundError:
            pass
        except OSError as error:
            self.notes.append(f"The folder samples cannot be read: {error.strerror}.")
        return steps


def _spread(steps: list[int], most: int) -> list[int]:
    """At most so many, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(at * (len(steps) - 1) / (most - 1))] for at in range(most)]


def _address(path: Path, exact: bool = False) -> tuple[str | None, str | None, bool]:
    """A picture as a data: address, or why there is none; and whether it was made smaller."""
    try:
        content = read_bytes(path, _FILE)
        if content[:8] != _PNG:
            raise ValueError("it is no PNG")
        width, height = struct.unpack(">II", content[16:24])
        if width * height > _PIXELS:
            raise ValueError(f"{width} x {height} pixels, at most {_PIXELS} are allowed")
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            if len(content) < LARGE or exact:
                return _data("png", content), None, False
            smaller = image.convert("RGB")
        smaller.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        file = io.BytesIO()
        smaller.save(file, "JPEG", quality=90, subsampling=0)
        return _data("jpeg", file.getvalue()), None, True
    except Exception as error:  # on broken bytes Pillow raises nearly anything
        reason = (isinstance(error, OSError) and error.strerror) or str(error).rstrip(".") or type(error).__name__
        return None, reason, False


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
