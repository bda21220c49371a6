"""The run folder: where things lie in it, and its lock."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvq.atomic import write_text
from kvq.config import RunConfig, parse_config
from kvq.errors import ConfigError, RunError
from kvq.untrusted import parse_json, read_bytes

_TEXT_LIMIT = 2**20  # bytes of config.toml or run.json
_METRICS_LIMIT = 2**30  # bytes; a record is a few hundred

FORMAT_VERSION = 1


class Run:
    """A run folder. Names what lies in it; reads and writes the small files. Nothing is created before it is written.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config_file = self.folder / "config.toml"
        self.record_file = self.folder / "run.json"
        self.metrics_file = self.folder / "metrics.jsonl"
        self.checkpoints = self.folder / "checkpoints"
        self.samples = self.folder / "samples"
        self.loss_plot = self.folder / "loss.png"
        self.codebook_plot = self.folder / "codebook.png"
        self.model = self.folder / "model"
        self.tensorboard = self.folder / "tensorboard"
        self.skipped_file = self.folder / "skipped.txt"
        self.log_file = self.folder / "log.txt"
        self.evaluation_file = self.folder / "evaluation.json"
        self.report = self.folder / "report.html"
        self.comparison = self.folder / "comparison.html"
        self._unwritten: list[dict[str, Any]] = []

    @property
    def exists(self) -> bool:
        # Both: other programs write a run.json, too, and what is a run may be overwritten.
        return self.record_file.exists() and self.config_file.exists()

    @property
    def config(self) -> RunConfig:
        """The content of config.toml.

        Raises:
            ConfigError: If it is not allowed.
            RunError: If it cannot be read.
        """
        try:
            text = self._read(self.config_file, _TEXT_LIMIT).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.config_file} cannot be read: {error}.") from None
        return parse_config(text, str(self.config_file))

    @property
    def record(self) -> dict[str, Any]:
        """The content of run.json."""
        content = self._read(self.record_file, _TEXT_LIMIT)
        try:
            record = parse_json(content)
        except ValueError as error:
            raise RunError(f"{self.record_file} cannot be read: {error}. A run folder has a run.json.") from None
        if not isinstance(record, dict):
            raise RunError(f"{self.record_file} must hold a JSON object. Received: {type(record).__name__}.")
        version = record.get("format_version", 1)
        if version != FORMAT_VERSION:
            raise RunError(
                f"{self.folder} is a run of format {version}, of kvq {record.get('kvq', 'unknown')}. This kvq reads format "
                f"{FORMAT_VERSION}: use that kvq, or another --out."
            )
        return record

    def create(self, config: RunConfig, record: dict[str, Any], overwrite: bool = False) -> None:
        """Makes the folder with its configuration and record.

        Raises:
            RunError: If the folder holds a run (unless told to overwrite it), holds anything else, or cannot be written.
        """
        if self.exists and not overwrite:
            raise RunError(f"{self.folder} holds a run. Give --resume to go on, --overwrite to replace it, or another --out.")
        if self.folder.exists() and not self.exists and any(self.folder.iterdir() if self.folder.is_dir() else [1]):
            raise RunError(f"{self.folder} exists and is not a run folder. Give another --out.")
        try:
            if self.exists:
                with self.locked():
                    shutil.rmtree(self.folder)
            self.samples.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self.write_config(config)
            self.write_record({"format_version": FORMAT_VERSION, **record})
        except OSError as error:
            raise RunError(f"{self.folder} cannot be written: {error.strerror}. Give another --out.") from None

    def write_config(self, config: RunConfig) -> None:
        write_text(self.config_file, config.to_toml())

    def write_record(self, record: dict[str, Any]) -> None:
        write_text(self.record_file, json.dumps(record, indent=2) + "\n")

    def write_evaluation(self, result: dict[str, Any]) -> None:
        """Writes evaluation.json, whole or not at all."""
        write_text(self.evaluation_file, json.dumps(result, indent=2, allow_nan=False) + "\n")

    def update_record(self, **changes: Any) -> None:
        self.write_record({**self.record, **changes})

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl.

        Raises:
            OSError: If that cannot be done now; the next call adds this line too.
        """
        self._unwritten.append(record)
        with self.metrics_file.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            content = "".join(json.dumps(line) + "\n" for line in self._unwritten).encode()
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.metrics_file))
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
        self._unwritten.clear()

    def log(self, text: str) -> None:
        """Adds a line with the time to log.txt, if that can be written."""
        with contextlib.suppress(OSError), self.log_file.open("a", encoding="utf-8") as file:
            file.write(f"{now()}  {text}\n")

    def nonfinite_file(self, step: int) -> Path:
        """Where the batch of a step goes whose loss or gradient was not finite."""
        return self.folder / f"nonfinite_{step:08d}.npz"

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every record of metrics.jsonl; what is none, such as a line that a killed process left unfinished, is passed over."""
        if not os.path.lexists(self.metrics_file):
            return []
        records = []
        for line in self._read(self.metrics_file, _METRICS_LIMIT).splitlines():
            with contextlib.suppress(ValueError):
                record = parse_json(line)
                if isinstance(record, dict) and type(step := record.get("step")) is int and 0 <= step < 2**63:
                    records.append(record)
        return records

    def listing_file(self, split: str) -> Path:
        """Where the names of the files of a large folder are kept, so that it is walked through once."""
        return self.folder / "listings" / ("validation" if split == "test" else split)

    def drop_metrics_after(self, step: int) -> None:
        """Takes back what was logged after the checkpoint that a run resumes from."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        write_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run for this process; a killed process lets go.

        Raises:
            RunError: If another process holds it, or it has a link through which something outside of it would be written.
        """
        self._check_no_links()
        try:
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise RunError(f"{self.folder} cannot be written: {error.strerror}. Give another --out.") from None
        with os.fdopen(descriptor, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(
                    f"{self.folder} is being written by another process. Wait for it, or give another --out."
                ) from None
            yield

    def _check_no_links(self) -> None:
        for folder, folders, files in os.walk(self.folder):
            for path in (Path(folder, name) for name in [*folders, *files]):
                if path.is_symlink() or not (path.is_dir() or path.is_file()):
                    raise RunError(f"{path} is a link or a pipe, and kvq writes through none. Put the file itself there.")

    def _read(self, path: Path, limit: int) -> bytes:
        try:
            return read_bytes(path, limit)
        except (OSError, ValueError) as error:
            if not self.folder.exists():
                raise RunError(f"There is no {self.folder}. Give a run folder, as `kvq train` writes it.") from None
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise RunError(f"{path} cannot be read: {reason}. A run folder has a {path.name}.") from None


def now() -> str:
    """The time as a run's files have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
