"""The errors that varjax raises on purpose, told apart from those of its libraries.

A program shows the message of one of these to its user and ends. Any other ValueError, of NumPy or JAX for example, is
a fault in the program and keeps its traceback.
"""

import importlib
import operator
from typing import Any


class InputError(ValueError):
    """What was given cannot be used. The message names it, says what was expected, and what to do."""


class NotTestableError(InputError):
    """The data are sound but cannot answer this question: too few documents, say, or experts that are not ranked.

    A report prints the message instead of a result. No other error may become a result.
    """


def require_integer(name: str, value: Any, least: int) -> None:
    """Check an argument that counts something.

    Args:
        name: of the argument.
        value: that was given.
        least: the smallest that is allowed.

    Raises:
        InputError: `value` is not an integer (true and false are not), or is less than `least`.
    """
    try:
        counted = not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        counted = False
    if not counted:
        raise InputError(f"{name}={value!r}; expected an integer of at least {least}")


class Library:
    """A library that the core does not require, imported when something of it is first used.

    Args:
        name: the module.
        extra: the extra of varjax that installs it.

    Raises:
        InputError: on use, if it is not installed.
    """

    def __init__(self, name: str, extra: str = "analysis"):
        self._name, self._extra = name, extra

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # asked by tools that inspect modules
            raise AttributeError(attribute)
        try:
            module = importlib.import_module(self._name)
        except ModuleNotFoundError as error:
            package = self._name.partition(".")[0]
            if error.name != package:
                raise
            raise InputError(f"{package} is not installed; install it: pip install 'varjax[{self._extra}]'") from error
        return getattr(module, attribute)
