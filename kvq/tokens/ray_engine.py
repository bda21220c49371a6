"""Shards of a token data set encoded by the workers of a Ray cluster, with Ray Data: one model in each.

Only numbers and notes travel through Ray. Workers read the images and write the shards themselves, in folders that all machines
see: a shard is there whole or not at all, whatever dies, and the bytes are those of any other engine.
"""

import contextlib
import importlib.util
import logging
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvq import artifact, backends
from kvq.data.places import KNOWN
from kvq.data.token_set import MANIFEST, PLAN, TokenPlan
from kvq.errors import BackendError, KvqError, WorkerError, installing
from kvq.evaluation import images_for
from kvq.tokenizer import Tokenizer
from kvq.tokens import shards
from kvq.tokens.engines import EncodeShards, Job, encode_shard
from kvq.tokens.plan import plan_of
from kvq.tokens.shards import Note

CPUS = 4  # of a worker without a GPU, where there are that many
ATTEMPTS = 4  # at a shard, or at loading the model, each of which killed its worker
LATE = 60  # seconds after which a file that another machine wrote must be seen here
PASSED_ON = ("KVQ_DATA", "TF_CPP_MIN_LOG_LEVEL")
# Read when Ray is imported and started. Its C++ library writes to stderr what no argument of `init` reaches.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
# Nothing of it then listens where other machines could reach it. The name tells only where that is Ray's default.
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class RayEngine:
    """Workers of the cluster that Ray's own variable RAY_ADDRESS names, or of a Ray on this machine that ends with the work.

    A Ray that this process is connected to already is used, and left as it is.

    Args:
        workers: How many, each with a model and one GPU, or without one up to `CPUS` processors. Default: as many as there is
            room for.

    Raises:
        BackendError: If Ray is not installed.
    """

    def __init__(self, workers: int | None = None):
        if workers is not None and workers < 1:
            raise ValueError(f"`workers` must be at least 1. Received: {workers}.")
        if not _installed():
            raise BackendError(f"Encoding on Ray needs it: {installing('ray')}.")
        self.workers = workers

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[EncodeShards]:
        with _connected(self.workers):
            yield lambda numbers, on_images: self._encode_shards(job, list(numbers), on_images)

    def _encode_shards(self, job: Job, numbers: list[int], on_images: Callable[[int], None]) -> Iterator[tuple[int, Note]]:
        import ray

        workers, resources = _share(ray.cluster_resources(), self.workers, len(numbers))
        # Ray Data alone would try for ever.
        attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Attempts).remote()
        variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        # A block for each shard: what is done again after a death is one of them.
        rows = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers)).map(
            _Worker,  # type: ignore[arg-type, unused-ignore]
            fn_constructor_args=(*_place(job), attempts),
            # No shard waits for a worker while another one is idle.
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            runtime_env={"env_vars": {**variables, "KERAS_BACKEND": job.plan.backend}},
            **resources,
        )
        try:
            for row in rows.iter_rows():
                if row["failure"]:
                    raise WorkerError(f"{row['failure']} What is encoded already is kept; run it again.")
                note = Note.model_validate_json(row["note"])
                _await(job.out, row["number"], row["host"])
                on_images((note.shard.images if note.shard else 0) + len(note.skipped))
                yield row["number"], note
        except ray.exceptions.RayError as error:
            raise WorkerError(f"Ray gave up: {str(error).strip()}\nWhat is encoded already is kept; run it again.") from error


class _Worker:
    """An actor of Ray Data's: maps the number of a shard to its note, having written it.

    A failure becomes a value. An exception would be retried, logged and wrapped by Ray.
    """

    def __init__(self, model: Path, data: str, split: str, out: Path, plan: TokenPlan, attempts: Any):
        import ray

        self.model, self.data, self.split, self.out, self.plan = model, data, split, out, plan
        self.attempts, self.failure = attempts, ""
        self._attempt(f"the start of {ray.get_runtime_context().get_actor_id()}", self._load)

    def _load(self) -> None:
        if not any((self.out / name).exists() for name in (PLAN, MANIFEST)):
            raise WorkerError(f"{self.out} is not there. Give a folder that all machines see under the same path.")
        config = artifact.check(artifact.model_folder(self.model))
        self.source = images_for(self.model, config, self.data, self.split)
        shards.begin(self.out, plan_of(config, self.source, self.plan.batch_size, self.plan.shard_size))
        self.tokenizer = Tokenizer.load(self.model)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = row["number"]
        note = None if self.failure else self._attempt(f"shard {number}", lambda: self._encode(number))
        content = note.model_dump_json() if note else ""
        return {"number": number, "note": content, "failure": self.failure, "host": socket.gethostname()}

    def _encode(self, number: int) -> Note:
        # There is a note where a worker died after it had written.
        note = shards.note_of(self.out, number)
        return note or encode_shard(self.tokenizer, self.source, self.out, self.plan, number, lambda images: None)

    def _attempt(self, what: str, work: Callable[[], Any]) -> Any:
        import ray

        try:
            if ray.get(self.attempts.begin.remote(what)) > ATTEMPTS:
                raise WorkerError(
                    f"{ATTEMPTS} workers died at {what}. They may lack memory: a smaller --batch-size, or fewer --workers on "
                    "each machine, need less."
                )
            result = work()
            ray.get(self.attempts.end.remote(what))
            return result
        except Exception as error:
            known = isinstance(error, KvqError | OSError)
            message = str(error) if known else f"\n{traceback.format_exc()}"
            self.failure = f"A worker on {socket.gethostname()} failed: {message}"


class _Attempts:
    """An actor that knows how often each piece of work was begun and not ended."""

    def __init__(self) -> None:
        self.begun: dict[str, int] = {}

    def begin(self, what: str) -> int:
        self.begun[what] = self.begun.get(what, 0) + 1
        return self.begun[what]

    def end(self, what: str) -> None:
        del self.begun[what]


def _installed() -> bool:
    return importlib.util.find_spec("ray") is not None


def _place(job: Job) -> tuple[Path, str, str, Path, TokenPlan]:
    """What a worker starts with, in whatever folder it starts."""
    data = job.data if job.data in KNOWN else os.path.abspath(Path(job.data).expanduser())
    model = Path(os.path.abspath(artifact.model_folder(job.model)))
    return model, data, job.plan.source.split, Path(os.path.abspath(job.out)), job.plan


def _share(cluster: dict[str, float], wanted: int | None, most: int) -> tuple[int, dict[str, Any]]:
    """How many workers, and what each one takes of the cluster, in Ray's words."""
    if gpus := int(cluster.get("GPU", 0)):
        return min(wanted or gpus, most), {"num_gpus": 1}
    cpus = int(cluster.get("CPU", 1))
    workers = min(wanted or max(1, cpus // CPUS), most)
    return workers, {"num_cpus": min(CPUS, max(1, cpus // workers))}


@contextlib.contextmanager
def _connected(workers: int | None) -> Iterator[None]:
    address = os.environ.get("RAY_ADDRESS") or "local"
    alone = address == "local"
    with _variables({**QUIET, **(ON_LOOPBACK if alone else {})}):
        import ray
        import ray.data

        found = ray.is_initialized()
        if not found:
            own = {"num_cpus": max(backends.cpus(), workers or 1), "include_dashboard": False}
            settings: dict[str, Any] = own if alone else {}
            try:
                host, _, port = address.rpartition(":")
                if host and port.isdecimal() and "/" not in host:
                    # Ray tries for minutes.
                    socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
                with _stderr_of_failures():
                    ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **settings)
            except (OSError, ValueError, RuntimeError) as error:
                raise WorkerError(f"Ray could not be reached at RAY_ADDRESS={address}: {error}") from error
            ray.data.DataContext.get_current().enable_progress_bars = False
            for handler in logging.getLogger("ray.data").handlers:
                handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        if not found:
            ray.shutdown()


@contextlib.contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while, where they are not set."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _stderr_of_failures() -> Iterator[None]:
    """Holds back what anything writes to stderr, and drops it where nothing fails."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            os.write(stderr, said.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _await(out: Path, number: int, host: str) -> None:
    """Returns when a shard is seen from here. A file system of the network may show it late."""
    until = time.monotonic() + LATE
    while not (shards.note_of(out, number) or (out / MANIFEST).exists()):
        if time.monotonic() > until:
            raise WorkerError(f"{out} of {host} is another folder than here. Give one that all machines see under the same path.")
        time.sleep(0.5)
