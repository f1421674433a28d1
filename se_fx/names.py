"""Names: the qualified names of a model's parts, the patterns they match, and the groups they fall into."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable

from se_fx.errors import SqueezeExciteError, shown

__all__ = ["check_each_matches", "matches", "split", "stages"]

_MOST = 10  # stages that one glance takes in


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


def stages(names: Iterable[str]) -> dict[str, list[str]]:
    """Names, in the order of the model, by the shortest prefixes that tell its parts apart.

    A part that holds more than half of all names is split into its own parts, unless these are single convs, or there would
    be more than ten in all.

    >>> list(stages(["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer2.0.conv1", "layer2.1.conv1"]))
    ['conv1', 'layer1', 'layer2']
    >>> list(stages(["stem", *(f"blocks.{i}.{j}.conv" for i in range(3) for j in range(2)), "head"]))
    ['stem', 'blocks.0', 'blocks.1', 'blocks.2', 'head']
    """
    names = list(names)
    groups = split("", names)
    if len(groups) > (_MOST if len(groups) == len(names) else 2 * _MOST):
        return {"": names}
    while groups:
        largest = max(groups, key=lambda prefix: len(groups[prefix]))
        parts = split(largest, groups[largest])
        dominates = len(groups) == 1 or 2 * len(groups[largest]) > len(names)
        if not dominates or len(parts) == len(groups[largest]) or len(groups) - 1 + len(parts) > _MOST:
            break
        groups = {
            prefix: members
            for group, whole in groups.items()
            for prefix, members in (parts if group == largest else {group: whole}).items()
        }
    return groups


def split(prefix: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Names that begin with `prefix`, by the prefixes of one component more; a name that ends there is one of its own."""
    depth = len(prefix.split(".")) + 1 if prefix else 1
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(".".join(name.split(".")[:depth]), []).append(name)
    return groups
