"""The faults of a client's JSON in words, the same for bodies and frames: which field, and what is expected there."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

FIELD = re.compile(r"Object (missing required|contains unknown) field `(.*)`")
NAME = re.compile(r"[A-Za-z_]+")


def wrong_field(problem: msgspec.ValidationError, kind: Any) -> tuple[str, str]:
    """Return the path of the field (`messages[0].role`, "" for the whole) and what is wrong there.

    kind: the type that the JSON was decoded as.
    """
    what, _, path = str(problem).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    found = FIELD.fullmatch(what)
    if found is not None:
        path = f"{path}.{found[2]}".lstrip(".")
        what = "this is needed" if found[1] == "missing required" else "there is no such field"
    if what.startswith(("Invalid enum value", "Invalid value")) and (words := _allowed(kind, NAME.findall(path))):
        what = f"expected one of {', '.join(words)}"
    return path, what


def _allowed(kind: Any, names: list[str]) -> tuple[Any, ...]:
    """Return the words that a type allows in the field of this path of names."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        config = kind.__struct_config__
        own = names[0] == config.tag_field  # the field that says which struct of a union this is
        return (config.tag,) if own else _allowed(get_type_hints(kind).get(names[0]), names[1:])
    return sum((_allowed(part, names) for part in get_args(kind)), ())
