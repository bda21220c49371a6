"""Values against a section of a configuration: what is wrong with them, all at once and in words."""

import difflib
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

import pydantic

from kvq.errors import ConfigError

Model = TypeVar("Model", bound=pydantic.BaseModel)
_NAMED = 20  # mistakes, before the rest of them is only counted


def check(model: type[Model], values: Mapping[str, Any], origin: str) -> Model:
    """`values` as a `model`; what is wrong with them, all at once and in words, as a ConfigError."""
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        found = error.errors()
        lines = [_in_words(model, dict(mistake)) for mistake in found[:_NAMED]]
        lines += [f"and {len(found) - _NAMED} more."] if len(found) > _NAMED else []
        mistakes = "".join(f"\n  {line if len(line) <= 500 else line[:500] + ' ...'}" for line in lines)
        misfits = [".".join(_walk(model, one["loc"])[1]) for one in found if one["type"] in ("extra_forbidden", "missing")]
        raise ConfigError(f"{origin} does not fit:{mistakes}", misfits) from None


def nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _in_words(model: type[pydantic.BaseModel], mistake: dict[str, Any]) -> str:
    """One of pydantic's errors as a sentence that names the key as the file has it."""
    section, path = _walk(model, mistake["loc"])
    key = ".".join(path)
    context = mistake.get("ctx", {})
    match mistake["type"]:
        case "extra_forbidden":
            siblings = {*section.model_fields} if section else {*()}
            near = difflib.get_close_matches(path[-1], sorted(siblings), 1)
            hint = f"Did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"Known: {', '.join(sorted(siblings))}."
            return f"{key}: there is no such key. {hint}"
        case "missing":
            return f"{key}: is missing."
        case "union_tag_not_found":
            return f"{key}.{context['discriminator'].strip(chr(39))}: is missing."
        case "union_tag_invalid":
            tags = context["expected_tags"].replace("'", "").split(", ")
            field, hint = context["discriminator"].strip("'"), nearest(str(context["tag"]), tags)
            return f"{key}.{field}: must be one of {', '.join(tags)}. Received: {context['tag']!r}{hint}."
        case "value_error":
            return str(context["error"])
    message = mistake["msg"][0].lower() + mistake["msg"][1:]
    return f"{key}: {message}. Received: {reprlib.repr(mistake['input'])}."


def _walk(model: type[pydantic.BaseModel], loc: tuple[Any, ...]) -> tuple[type[pydantic.BaseModel] | None, list[str]]:
    """The section that the last name of `loc` belongs to, and `loc` without the tags that pydantic puts in for unions."""
    section: type[pydantic.BaseModel] | None = model
    path: list[str] = []
    members: list[type[pydantic.BaseModel]] = []
    for index, part in enumerate(loc):
        tagged = [member for member in members if part in _tags(member)]
        if tagged:
            section, members = tagged[0], []
            continue
        path.append(str(part))
        if index == len(loc) - 1:
            break
        field = section.model_fields.get(str(part)) if section else None
        kinds = [field.annotation, *get_args(field.annotation)] if field else []
        members = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)]
        section = members[0] if members else None
    return section, path


def _tags(member: type[pydantic.BaseModel]) -> set[Any]:
    fields = [member.model_fields[name] for name in ("network", "kind") if name in member.model_fields]
    return {tag for field in fields for tag in get_args(field.annotation)}
