"""What is wrong with a codebook, from what was measured, and which settings to change."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvq.codebook_use import perplexity

# Settings that bring codes back to where latents are.
_RESTART = ("codebook.initialise", "codebook.replace_dead_every", "codebook.dead_below", "train.learning_rate")


@dataclass(frozen=True)
class Finding:
    """Something that is wrong: its name, what was found, what to do, and the configuration's keys for it."""

    name: str
    found: str
    remedy: str
    keys: tuple[str, ...]


def findings(
    measured: dict[str, Any], counts: NDArray[np.int64], codes: NDArray[np.floating] | None, section: Any, replaceable: bool
) -> Iterator[Finding]:
    """What is wrong.

    Args:
        measured: Of `diagnose`.
        counts: (depth, codebook_size), how often training images use each code.
        codes: (codebook_size, dim), None of a quantizer without one codebook.
        section: The quantizer's, of a configuration. Only settings that it has are named.
        replaceable: Whether it has codes that can be placed and replaced.
    """
    for finding in _findings(measured, counts, codes, section, replaceable):
        yield replace(finding, keys=_existing(finding.keys, section, replaceable))


def _findings(
    measured: dict[str, Any], counts: NDArray[np.int64], codes: NDArray[np.floating] | None, section: Any, replaceable: bool
) -> Iterator[Finding]:
    deviation, length = measured["latent_deviation"], measured["latent_rms"]
    if deviation <= 1e-4 * max(length, 1e-8) or length < 1e-8:
        yield Finding(
            "constant latents",
            f"The encoder gives nearly the same latent for everything (deviation {deviation:.2g}).",
            "Train again with a lower learning rate, a warm-up, or clipped gradients.",
            ("train.learning_rate", "train.warmup_steps", "train.clip_norm"),
        )
    placing = "Start codes from data and replace dead ones; a" if replaceable else "A"
    restart = f"{placing} lower learning rate keeps latents from running away."
    for level, row in enumerate(counts):
        yield from _of_one_code(row, _who(level, counts), level, restart)
    if any(each.kind == "shared_residual" for each in _sections(section).values()):
        # Each level uses the codes of its scale, and all together the codebook.
        counts = counts.sum(axis=0, keepdims=True)
    for level, row in enumerate(counts):
        yield from _of_use(row, _who(level, counts), restart)
    if codes is not None:
        yield from _of_norms(measured, counts, codes)
    if measured["relative_error"] is not None and measured["relative_error"] > 0.5 and deviation:
        yield Finding(
            "coarse codes",
            f"Codes explain only {max(0.0, 1 - measured['relative_error']):.0%} of the latents' variance.",
            "Use more codes, several per position, or codes of fewer channels; a higher commitment weight holds latents close.",
            ("quantizer.codebook_size", "quantizer.kind", "quantizer.commitment_weight"),
        )
    if measured["validation_mse"] > 1.3 * measured["mse"]:
        yield Finding(
            "worse on validation",
            f"The error is {measured['validation_mse'] / measured['mse']:.2f} times that of training images.",
            "Train on more images or fewer steps; see that both are of the same kind.",
            ("data.source", "data.validation", "data.flip", "train.steps"),
        )
    if measured["code_shift"] > 0.1:
        yield Finding(
            "other codes on validation",
            f"Validation images use the codes differently: {measured['code_shift']:.2f} bits of 1.",
            "See that training and validation images are of the same kind and prepared alike.",
            ("data.source", "data.validation", "data.resize"),
        )


def _who(level: int, counts: NDArray[np.int64]) -> str:
    return f"Level {level}" if len(counts) > 1 else "The codebook"


def _of_one_code(counts: NDArray[np.int64], who: str, level: int, restart: str) -> Iterator[Finding]:
    if (counts > 0).sum() > 1:
        return
    if level:
        fewer = ("quantizer.levels", "quantizer.groups")
        yield Finding(
            "unused level", f"{who} uses one code: it adds nothing.", f"Take fewer levels. {restart}", (*fewer, *_RESTART)
        )
    else:
        yield Finding("one code", f"{who} uses one code of {len(counts)}: it tells nothing.", restart, _RESTART)


def _of_use(counts: NDArray[np.int64], who: str, restart: str) -> Iterator[Finding]:
    used, total, size = int((counts > 0).sum()), int(counts.sum()), len(counts)
    if used == 1:
        return
    # Of a few positions only so many codes could be used, were all used alike.
    possible = size * -np.expm1(-total / size)
    if used < 0.5 * possible:
        yield Finding(
            "dead codes",
            f"{who} uses {used} of {size} codes.",
            f"{restart} Or fewer codes.",
            (*_RESTART, "quantizer.codebook_size"),
        )
    evenly = perplexity(counts)
    if evenly < 0.15 * min(used, possible) or (used < 0.5 * possible and evenly < 2):
        yield Finding(
            "few codes carry all",
            f"{who} uses {used} codes, as unevenly as {evenly:.1f} would be used evenly.",
            f"{restart} The entropy regulariser evens out.",
            (*_RESTART, "quantizer.regularisers"),
        )


def _of_norms(measured: dict[str, Any], counts: NDArray[np.int64], codes: NDArray[np.floating]) -> Iterator[Finding]:
    if not measured["latent_rms"]:
        return
    unused = codes[counts[0] == 0]
    keys = ("codebook.initialise", "codebook.replace_dead_every", "quantizer.decay")
    for who, size in (("Used codes", measured["code_rms"]), ("Unused codes", rms(unused) if len(unused) else None)):
        if size is None:
            continue
        ratio = size / measured["latent_rms"]
        if ratio < 0.2:
            yield Finding(
                "codes at the origin",
                f"{who} are {ratio:.2g} times as long as latents: they shrank, or never left the start.",
                "Start codes from data; where they follow averages, a lower decay follows faster.",
                keys,
            )
        if ratio > 5:
            yield Finding(
                "codes far away",
                f"{who} are {ratio:.2g} times as long as latents: the latents left them, or they exploded.",
                "Start codes from data, replace dead ones, and lower the learning rate.",
                (*keys, "train.learning_rate"),
            )


def _existing(keys: tuple[str, ...], section: Any, replaceable: bool) -> tuple[str, ...]:
    """Those of the settings that a quantizer of this section has, where it has them: of one inside, as `quantizer.base.decay`."""
    sections, found = _sections(section), list[str]()
    for key in keys:
        part, name = key.split(".")
        if part == "quantizer":
            found += [f"{path}.{name}" for path, each in sections.items() if name in type(each).model_fields][:1]
        elif part != "codebook" or replaceable:
            found.append(key)
    return tuple(found)


def _sections(section: Any) -> dict[str, Any]:
    """A quantizer's section and those inside it, by the key that each has in a configuration."""
    sections = {"quantizer": section}
    while hasattr(section, "base"):
        section = section.base
        sections[f"{[*sections][-1]}.base"] = section
    return sections


def rms(codes: NDArray[np.floating]) -> float:
    """Root of the mean square length of codes (n, dim)."""
    return float(np.sqrt(np.mean(np.sum(codes.astype("float64") ** 2, axis=-1))))
