"""Names: how the qualified names of a model's parts fall into groups. Knows names alone."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["split", "stages"]

_MOST = 10  # stages that one glance takes in


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
