"""Errors that a person can mend: the command lines print their one line and exit with status 2, without a traceback."""

import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Something in what the caller gave is wrong. The message names it, its value, what is valid, and the fix."""


def close_names(name: str, choices: Iterable[str], count: int = 3) -> str:
    """Says which of ``choices`` look like ``name``, as a whole or by one of their words, or lists them if none does."""
    choices = sorted(choices)
    wanted = name.lower()

    def likeness(choice: str) -> float:
        words = [choice.lower(), *re.split(r"[\W_]+", choice.lower()), re.split(r"\.", choice.lower())[-1]]
        return max(difflib.SequenceMatcher(None, wanted, word).ratio() for word in words)

    close = [c for c in sorted(choices, key=likeness, reverse=True) if likeness(c) > 0.6][:count]
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return f"there are: {listed(choices)}"


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names in a row, no more than ``most`` of them, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def choose(what: str, name: str, table: Mapping[str, T]) -> T:
    """Looks ``name`` up in ``table``.

    Raises:
      UserError: ``name`` is not there; the message lists what is.
    """
    if name not in table:
        raise UserError(f"{what} is {name!r}, but must be one of {', '.join(sorted(table))}")
    return table[name]


def check_range(
    name: str, value: float, least: float | None = None, most: float | None = None, above: float | None = None
):
    """Raises `UserError` unless ``least <= value <= most`` and ``above < value``; a NaN never passes."""
    bounds = {"at least": least, "above": above, "at most": most}
    fits = (least is None or value >= least) and (above is None or value > above) and (most is None or value <= most)
    if not fits or value != value:
        wanted = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        raise UserError(f"{name} is {value}, but must be {wanted}")


leave: list[Callable[[int], NoReturn]] = [sys.exit]
"""The last is how a command ends that has failed. A run of several processes adds its own: these wait for each other at exit."""


def exit_on_user_error(command: Callable[..., T]) -> Callable[..., T]:
    """Wraps a command line's main: a `UserError` ends it with one line on standard error and exit status 2."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            line = " ".join(str(error).split())  # names in a file can have line breaks
            print(f"error: {line}", file=sys.stderr, flush=True)
            leave[-1](2)

    return wrapped
