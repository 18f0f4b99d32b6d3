"""JSON files of a checkpoint, which anybody may have written or damaged, and the one type that each field has.

What json gives is any tree of values: an integer of a thousand digits, NaN, a list where a name should be. Nothing else
in `models` looks at such values before they passed here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from varjax.errors import InputError

MOST = 2**31 - 1  # sizes and ids are int32 on the device
_SHOWN = 80  # characters of a value that a message shows
_LARGEST = 3e38  # of float32


@dataclasses.dataclass(frozen=True)
class Kind:
    """The type of a field."""

    expected: str  # as a message says it
    fits: Callable[[Any], bool]

    def or_null(self) -> Kind:
        """The same, and null."""
        return Kind(f"{self.expected} or null", lambda value: value is None or self.fits(value))


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer that int32 can hold; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float that float32 can hold, so neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def integer_up_to(most: int) -> Kind:
    """A positive integer with a bound."""
    return Kind(f"a positive integer up to {most:,}", lambda value: is_integer(value) and 0 < value <= most)


SIZE = integer_up_to(MOST)
COUNT = Kind("an integer of 0 or more", lambda value: is_integer(value) and value >= 0)
POSITIVE = Kind("a positive number", lambda value: is_number(value) and value > 0)
NOT_NEGATIVE = Kind("a number of 0 or more", lambda value: is_number(value) and value >= 0)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TOKEN = Kind("a token id", COUNT.fits)
TOKENS = Kind(
    "a token id or a list of them",
    lambda value: all(map(TOKEN.fits, value)) if isinstance(value, list | tuple) else TOKEN.fits(value),
)


def without_negative_ids(value: Any) -> Any:
    """The value of a token id's field, null for a negative id: published files say -1 where there is none."""
    if isinstance(value, list):
        return [one for one in value if not (is_integer(one) and one < 0)] or None
    return None if is_integer(value) and value < 0 else value


def wrong_types(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> list[str]:
    """One sentence for each field of `values` whose value is not of its kind."""
    return [
        f"{name} is {shown(values[name])}, expected {kind.expected}"
        for name, kind in kinds.items()
        if name in values and not kind.fits(values[name])
    ]


def shown(value: Any) -> str:
    """A value as a message shows it: its beginning, if it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "an integer of too many digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def read_object(path: Path, error: type[InputError], source: str | None = None) -> dict[str, Any]:
    """The fields of a JSON file.

    Args:
        error: what is raised.
        source: the file's name in messages; None: its path.

    Raises:
        InputError: as `error`; the file cannot be opened, is not JSON in UTF-8, or is not an object.
    """
    name = source or str(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{name} does not exist; a model directory needs it") from None
    except OSError as problem:
        raise error(f"{name} cannot be read ({problem.strerror}); check the path and its permissions") from None
    except (ValueError, RecursionError) as problem:  # not UTF-8, not JSON, too many digits, nested too deep
        raise error(f"{name} is not valid JSON ({problem}); fetch the file again") from None
    if not isinstance(fields, dict):
        raise error(f"{name} holds a JSON {type(fields).__name__}, expected an object; fetch the file again")
    return fields


def ids_of(value: Any) -> tuple[int, ...]:
    """The ids in a field of kind TOKENS, or null: one, several or none."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def listed(names: Iterable[str]) -> str:
    """`'a', 'b' and 'c'`."""
    *most, last = (repr(name) for name in names)
    return f"{', '.join(most)} and {last}" if most else last
