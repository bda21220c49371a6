"""A token data set while it is written: shard by shard, each whole or absent, by one process or by several into one folder.

Beside the files of a shard a note says what they are; it comes last, so that a shard with a note is whole. Whoever finds all
notes there writes tokens.json from them. Nothing depends on who wrote which shard, or when.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from numpy.typing import NDArray

from kvq.atomic import write_bytes, write_new
from kvq.data.listing import Listing
from kvq.data.skipped import to_lines
from kvq.data.token_set import MANIFEST, PLAN, File, TokenPlan, TokenSet, TokenShard, read_token_set
from kvq.errors import DataError, TokensError

SKIPPED = "skipped.txt"


class Note(pydantic.BaseModel):
    """What came of a shard: its files, None if none of its images could be used, and name and reason of each that could not."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    shard: TokenShard | None
    skipped: list[tuple[str, str]]


def begin(out: Path, plan: TokenPlan) -> TokenSet | None:
    """Makes the folder, or finds that it was begun with the same plan; the set, if it is complete already.

    Raises:
        TokensError: If the folder holds something else, or a set that was begun with another model, other data or settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MANIFEST).exists():
        _claim(out, plan)
    if not (out / MANIFEST).exists():
        return None
    described = read_token_set(out)
    _check_same(out, described.model_dump(include=set(TokenPlan.model_fields)), plan)
    (out / PLAN).unlink(missing_ok=True)
    return described


def _claim(out: Path, plan: TokenPlan) -> None:
    """Puts the plan into a new folder, or finds the same one there. Other processes may do so at the same moment."""
    entries = [entry.name for entry in out.iterdir() if not _is_temporary(entry)]
    # In this order: files of another process come after its plan, and tokens.json before the plan goes.
    if entries and not (out / PLAN).exists() and not (out / MANIFEST).exists():
        raise TokensError(f"{out} must be a new folder, or one that `kvq encode` began. It holds something else.")
    try:
        write_new(out / PLAN, plan.model_dump_json(indent=2).encode())
    except FileNotFoundError:
        if not (out / MANIFEST).exists():
            raise
    except FileExistsError:
        try:
            begun = TokenPlan.model_validate_json((out / PLAN).read_bytes())
        except FileNotFoundError:
            return  # the set was completed meanwhile
        except pydantic.ValidationError:
            raise TokensError(
                f"{out} was begun by another kvq, or {PLAN} is broken. Remove the folder, or give another."
            ) from None
        _check_same(out, begun.model_dump(), plan)


def _check_same(out: Path, begun: dict[str, Any], plan: TokenPlan) -> None:
    wanted = plan.model_dump()
    if begun["weights_sha256"] != plan.weights_sha256:
        raise TokensError(f"{out} holds a set of another model. Remove it, or give another folder.")
    if differences := _differences(begun, wanted):
        raise TokensError(
            f"{out} was made otherwise: {', '.join(differences)}. Give what it was made with to go on, remove it, or give "
            "another folder."
        )


def _differences(begun: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Each member that is another, as `split: train instead of test`."""
    found = []
    for key, value in wanted.items():
        if isinstance(value, dict) and isinstance(begun.get(key), dict):
            found += _differences(begun[key], value)
        elif begun.get(key) != value:
            found.append(f"{key}: {value!s:.40} instead of {begun.get(key)!s:.40}")
    return found


def numbers(plan: TokenPlan) -> range:
    """The numbers of all shards of a set."""
    return range(-(-plan.source.images // plan.shard_size))


def note_of(out: Path, number: int) -> Note | None:
    """What came of a shard, if it is there with all its files."""
    try:
        note = Note.model_validate_json(_note_file(out, number).read_bytes())
    except (FileNotFoundError, pydantic.ValidationError):
        return None
    files = [note.shard.tokens, note.shard.names, note.shard.labels] if note.shard else []
    whole = all((out / file.file).is_file() and (out / file.file).stat().st_size == file.bytes for file in files if file)
    return note if whole else None


def write_shard(
    out: Path,
    plan: TokenPlan,
    number: int,
    tokens: NDArray[np.integer],
    labels: NDArray[np.integer],
    names: Sequence[str] | None,
    skipped: list[tuple[str, str]],
) -> Note:
    """Writes one shard, its note last.

    Args:
        tokens: Of the plan's dtype, (n, *plan.shape), of the images that could be used, in order.
        labels: (n,), -1 where there is none.
        names: n names, or None if the images have only numbers.
        skipped: Name and reason of each image that could not be used.
    """
    shard = None
    if len(tokens):
        parts: dict[str, tuple[str, bytes] | None] = {
            "tokens": ("npy", to_npy(tokens)),
            "names": None if names is None else ("txt", Listing.of(names).content),
            "labels": ("npy", to_npy(_narrowed(labels))) if (labels != -1).any() else None,
        }
        files = {part: what and _write_described(out, f"{part}-{number:05d}.{what[0]}", what[1]) for part, what in parts.items()}
        shard = TokenShard(first=number * plan.shard_size, images=len(tokens), **files)
    # JSON has no names that are not UTF-8.
    shown = [(os.fsencode(name).decode("utf-8", "backslashreplace"), reason) for name, reason in skipped]
    note = Note(shard=shard, skipped=shown)
    _write(out, _note_file(out, number).name, note.model_dump_json().encode())
    return note


def join(out: Path, plan: TokenPlan) -> TokenSet | None:
    """Writes tokens.json and removes the notes, if all shards are there; the set, or None while shards are missing.

    Two processes may do so at the same time: both write the same.
    """
    notes = [note for number in numbers(plan) if (note := note_of(out, number))]
    if len(notes) < len(numbers(plan)):
        if not (out / MANIFEST).exists():
            return None
        # Another process has joined them meanwhile, and removed the notes.
        _tidy(out)
        return read_token_set(out)
    shards = [note.shard for note in notes if note.shard]
    skipped = [bad for note in notes for bad in note.skipped]
    if not shards:
        raise DataError(f"No image of {plan.source.name} can be used. The first: {skipped[0][0]}: {skipped[0][1]}.")
    if skipped:
        _write(out, SKIPPED, to_lines(skipped))
    images = sum(shard.images for shard in shards)
    described = TokenSet(**dict(plan), images=images, skipped=len(skipped), shards=shards)
    _write(out, MANIFEST, (described.model_dump_json(indent=1) + "\n").encode())
    _tidy(out)
    return described


def _tidy(out: Path) -> None:
    """Removes what only a set in the making needs, and what killed processes left."""
    for entry in [*out.iterdir()]:
        if entry.name.startswith(".shard-") or entry.name == PLAN or _is_temporary(entry):
            entry.unlink(missing_ok=True)


def _note_file(out: Path, number: int) -> Path:
    return out / f".shard-{number:05d}.json"


def _is_temporary(entry: Path) -> bool:
    """Whether `write_bytes` was at it: a killed process leaves such a file."""
    parts = (f".{PLAN}.", "..shard-", ".tokens-", ".names-", ".labels-", f".{MANIFEST}.", f".{SKIPPED}.")
    return entry.name.startswith(parts)


def _write(out: Path, name: str, content: bytes) -> None:
    try:
        write_bytes(out / name, content)
    except FileNotFoundError:
        # Another process may have completed the set and tidied a temporary file away: it wrote the same.
        if not (out / MANIFEST).exists():
            raise


def _write_described(out: Path, name: str, content: bytes) -> File:
    _write(out, name, content)
    return described_file(name, content)


def described_file(name: str, content: bytes) -> File:
    """What tokens.json says of a file."""
    return File(file=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def to_npy(array: NDArray[Any]) -> bytes:
    """The bytes of an .npy file of the first version of the format."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _narrowed(labels: NDArray[np.integer]) -> NDArray[np.integer]:
    """The same in the narrowest integers."""
    return labels.astype(np.result_type(*(np.min_scalar_type(int(bound)) for bound in (labels.min(), labels.max()))))
