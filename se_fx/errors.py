"""The one error class of se_fx, and how its messages help with names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["SqueezeExciteError", "hint"]


class SqueezeExciteError(ValueError):
    """Something the caller can mend: the message names the argument or node, what was expected, and what to do."""


def hint(name: object, known: Iterable[str], expected: str) -> str:
    """What a misspelt name may have meant; where nothing is close, all that is known.

    >>> hint("fold_norm", ["fold_norms"], "one of"), hint("x", ["fold_norms"], "one of")
    ("did you mean 'fold_norms'?", "expected one of 'fold_norms'")
    """
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected {expected} {', '.join(map(repr, names))}"
