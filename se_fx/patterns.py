"""Glob patterns of qualified names."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable

from se_fx.errors import SqueezeExciteError, shown

__all__ = ["check_each_matches", "matches"]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a qualified name matches any of some glob patterns.

    >>> matches("layer4.0.conv1", ["layer3.*", "layer4.*"])
    True
    """
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_each_matches(patterns: Iterable[str], names: Collection[str], argument: str, of: str) -> None:
    """Raise where a pattern matches none of the names.

    Args:
        patterns: the patterns.
        names: of the things that they are for, in their order.
        argument: which argument has them, for the error.
        of: what the names are of, for the error.

    Raises:
        SqueezeExciteError: names the first such pattern.
    """
    for pattern in patterns:
        if not isinstance(pattern, str) or not any(matches(name, [pattern]) for name in names):
            first = f"; the first is named {next(iter(names))!r}" if names else ""
            raise SqueezeExciteError(f"{argument}: {shown(pattern)} matches no {of}{first}")
