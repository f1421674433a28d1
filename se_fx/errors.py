"""The one error class of se_fx, and what its messages say of names, values and other errors."""

from __future__ import annotations

import contextlib
import difflib
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["SqueezeExciteError", "blaming", "first_line", "hint", "reason_of", "shown"]


class SqueezeExciteError(ValueError):
    """Something the caller can mend: the message names the argument or node, what was expected, and what to do."""


@contextlib.contextmanager
def blaming(what: str) -> Iterator[None]:
    """Within, code runs that isn't se_fx's.

    Raises:
        SqueezeExciteError: it raised; `what` says which code, of which argument.
    """
    try:
        yield
    except SqueezeExciteError:
        raise
    except Exception as error:
        raise SqueezeExciteError(f"{what}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).strip().split("\n")[0]


def reason_of(error: BaseException) -> str:
    """An error in a few words.

    >>> reason_of(RuntimeError("no memory. Try less")), reason_of(KeyboardInterrupt())
    ('RuntimeError: no memory', 'KeyboardInterrupt')
    """
    text = first_line(error).split(". ")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def hint(name: object, known: Iterable[str], expected: str) -> str:
    """What a misspelt name may have meant; where nothing is close, all that is known.

    >>> hint("fold_norm", ["fold_norms"], "one of"), hint("x", ["fold_norms"], "one of")
    ("did you mean 'fold_norms'?", "expected one of 'fold_norms'")
    """
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected {expected} {', '.join(map(repr, names))}"


def shown(value: Any) -> str:
    """A value in a message: its `repr`, on one line, without most of what is long or deep.

    >>> print(shown("gate"), shown(list(range(1000))), len(shown("a" * 1000)))
    'gate' [0, 1, 2, 3, 4, 5, 6, 7, ...] 80
    """
    try:
        return " ".join(_SHORT.repr(value).split())
    except Exception:  # a repr that fails: that of an int of some thousand digits does
        return f"<{type(value).__name__}>"


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 4
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
