"""What is wrong with values for a section, one line for each: key path, what was given, what is valid."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from types import UnionType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lhcp.config.model import ModelConfig
from lhcp.config.section import ConfigError

Root = type[BaseModel]
SectionT = TypeVar("SectionT", bound=BaseModel)

_TAG = "type"
"""The key that says which section of a union is meant."""
_KIND_IN_WORDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "path": "must be a path",
    "list": "must be a list",
    "tuple": "must be a list",
}
_LIMIT_IN_WORDS = {
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be greater than {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be less than {lt:g}",
    "multiple_of": "must be a multiple of {multiple_of:g}",
    "too_short": "must have at least {min_length} item(s)",
    "too_long": "must have at most {max_length} item(s)",
    "literal_error": "must be {expected}",
    "finite_number": "must be finite",
}


def validate(root: type[SectionT], data: Any) -> SectionT:
    """An instance of `root` from plain data, as YAML gives it.

    Raises:
        ConfigError: with one line per wrong key.
    """
    try:
        return root.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(root, one) for one in error.errors(include_url=False))) from None


def _describe(root: Root, error: ErrorDetails) -> str:
    """One line for one of pydantic's errors."""
    loc, kind, context = error["loc"], error["type"], error.get("ctx", {})
    key = _written(root, loc)
    if kind == "union_tag_not_found":
        return f"{key}.{_TAG}: required, must be {_tags_at(root, loc)}"
    if kind == "union_tag_invalid":
        return f"{key}.{_TAG}: given {shown(error['input'][_TAG])}, must be {_tags_at(root, loc)}"
    if kind == "missing":
        return f"{key}: required"
    if kind in ("extra_forbidden", "invalid_key"):
        return f"{key}: unknown key; {_suggestion(root, loc)}"
    if kind == "value_error":
        return f"{key}: {context['error']}"
    if kind == "model_type":
        valid = f"must be a section with the keys {', '.join(_keys_at(root, loc))}"
    elif kind == "model_attributes_type":
        valid = f"must be a section with {_TAG}: {_tags_at(root, loc)}"
    elif kind in _LIMIT_IN_WORDS:
        valid = _LIMIT_IN_WORDS[kind].format(**context)
    else:
        fallback = error["msg"].replace("Input should be", "must be")
        valid = _KIND_IN_WORDS.get(kind.partition("_")[0], fallback)
    return f"{key}: given {shown(error['input'])}, {valid}"


def _suggestion(root: Root, loc: Sequence[int | str]) -> str:
    keys = _keys_at(root, loc[:-1])
    close = difflib.get_close_matches(str(loc[-1]), keys, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    section = _written(root, loc[:-1])
    return f"{hint}valid{f' in {section}' if section else ''}: {', '.join(keys)}"


def _written(root: Root, loc: Sequence[int | str]) -> str:
    """The key path `loc` as in the file: pydantic also puts in which section of a union it took, by its tag."""
    return ".".join(str(part) for i, part in enumerate(loc) if _tagged(annotation_at(root, loc[:i]), part) is None)


def _keys_at(root: Root, loc: Sequence[int | str]) -> list[str]:
    """Every key of the section at `loc`."""
    (section,) = sections(annotation_at(root, loc))
    return (["preset"] if section is ModelConfig else []) + list(section.model_fields)


def _tags_at(root: Root, loc: Sequence[int | str]) -> str:
    """In words, the tags of the sections of which there can be one at `loc`."""
    return " or ".join(repr(_tag(section)) for section in sections(annotation_at(root, loc)))


def annotation_at(root: Root, loc: Sequence[int | str]) -> Any:
    """The declared type at the key path `loc`, with or without the tags of unions; None where a key is unknown."""
    here: Any = root
    for part in loc:
        here = _tagged(here, part) or _annotation_in(here, part)
    return here


def _annotation_in(annotation: Any, part: int | str) -> Any:
    """The declared type of a key of a section, or of the items of a list."""
    found = sections(annotation)
    if not found:
        return next(iter(get_args(annotation)), None)  # the items of a list are of one type
    fields = (section.model_fields.get(str(part)) for section in found)
    return next((field.annotation for field in fields if field), None)


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The section that a type is, or those of which it is one; they have different tags."""
    members = get_args(annotation) if isinstance(annotation, UnionType) else [annotation]
    return [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]


def _tagged(annotation: Any, tag: int | str) -> type[BaseModel] | None:
    """Of a type that is one of several sections, that with this tag."""
    found = sections(annotation)
    return next((section for section in found if len(found) > 1 and _tag(section) == tag), None)


def _tag(section: type[BaseModel]) -> str:
    return str(section.model_fields[_TAG].default)


def shown(value: object) -> str:
    """What the user gave, on one line and not longer than is useful."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
