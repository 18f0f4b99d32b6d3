"""The JSON files of a checkpoint, which anybody may have written or damaged: reading, and one type per field.

JSON gives any tree of values: an integer of a thousand digits, NaN, a list where a name should be. Nothing else in
`models` uses such a value before it has been checked here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from varjax.errors import InputError

_MOST = 2**31 - 1  # sizes and ids are int32 on the device
_LARGEST = 3e38  # of float32
_SHOWN = 80  # characters of a value that a message shows


@dataclasses.dataclass(frozen=True)
class Kind:
    """The type of a field."""

    expected: str  # the words of a message after "expected"
    fits: Callable[[Any], bool]

    def or_null(self) -> Kind:
        """Allow null too.

        Returns:
            The kind of this kind's values and null.
        """
        return Kind(f"{self.expected} or null", lambda value: value is None or self.fits(value))


def _is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer (not a boolean) that int32 can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST


def _is_number(value: Any) -> bool:
    """Whether a value is an integer or float that float32 can hold, so neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


INTEGER = Kind("an integer", _is_integer)
SIZE = Kind(f"a positive integer up to {_MOST:,}", lambda value: _is_integer(value) and value > 0)
NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a positive number", lambda value: _is_number(value) and value > 0)
NOT_NEGATIVE = Kind("a number of 0 or more", lambda value: _is_number(value) and value >= 0)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TOKEN = Kind("a token id", lambda value: _is_integer(value) and value >= 0)
TOKENS = Kind(
    "a token id or a list of them",
    lambda value: all(map(TOKEN.fits, value)) if isinstance(value, list | tuple) else TOKEN.fits(value),
)
LAYERS = Kind("a list of layers", lambda value: isinstance(value, list) and all(map(_is_integer, value)))


def without_negative_ids(value: Any) -> Any:
    """Replace negative ids by null: published files say -1 where there is no id.

    Args:
        value: of a field for one or several token ids.

    Returns:
        The value without its negative ids; None if nothing is left.
    """
    if isinstance(value, list):
        return [one for one in value if not (_is_integer(one) and one < 0)] or None
    return None if _is_integer(value) and value < 0 else value


def wrong_types(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> list[str]:
    """Compare the fields of a file with their kinds.

    Args:
        values: field -> value.
        kinds: field -> kind; other fields are not looked at.

    Returns:
        A phrase for each field whose value is not of its kind.
    """
    return [
        f"{name} is {shown(values[name])}, expected {kind.expected}"
        for name, kind in kinds.items()
        if name in values and not kind.fits(values[name])
    ]


def shown(value: Any) -> str:
    """Format a value for a message.

    Args:
        value: anything that JSON gives.

    Returns:
        Its representation, cut off if it is long.
    """
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "an integer of too many digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def read_object(path: Path, error: type[InputError]) -> dict[str, Any]:
    """Read the fields of a JSON file.

    Args:
        path: the file.
        error: the class of the exception.

    Returns:
        The fields.

    Raises:
        InputError: of class `error`; the file cannot be opened, is not JSON in UTF-8, or is not an object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist; a model directory needs it") from None
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror}); check the path and its permissions") from None
    except (ValueError, RecursionError) as problem:  # not UTF-8, not JSON, too many digits, nested too deep
        raise error(f"{path} is not valid JSON ({problem}); fetch the file again") from None
    if not isinstance(fields, dict):
        raise error(f"{path} holds a JSON {type(fields).__name__}, expected an object; fetch the file again")
    return fields
