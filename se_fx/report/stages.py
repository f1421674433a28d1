"""Stages: how the names of a model's convs fall into groups, as people read them. Knows names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["columns", "in_order", "ranges", "stages"]

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
    groups = _split("", names)
    if len(groups) > (_MOST if len(groups) == len(names) else 2 * _MOST):
        return {"": names}
    while groups:
        largest = max(groups, key=lambda prefix: len(groups[prefix]))
        parts = _split(largest, groups[largest])
        dominates = len(groups) == 1 or 2 * len(groups[largest]) > len(names)
        if not dominates or len(parts) == len(groups[largest]) or len(groups) - 1 + len(parts) > _MOST:
            break
        groups = {
            prefix: members
            for group, whole in groups.items()
            for prefix, members in (parts if group == largest else {group: whole}).items()
        }
    return groups


def columns(stage: str, names: Sequence[str], most: int = 8) -> list[list[str]]:
    """The names of one stage as columns of at most `most`: one for each of its blocks, where its blocks have several convs.

    >>> columns("layer1", ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"])
    [['layer1.0.conv1', 'layer1.0.conv2'], ['layer1.1.conv1', 'layer1.1.conv2']]
    >>> columns("features", ["features.0", "features.2", "features.5", "features.7", "features.10"])
    [['features.0', 'features.2', 'features.5', 'features.7'], ['features.10']]
    """
    parts = _split(stage, names)
    if len(parts) == len(names):
        height = max(min(4, most), -(-len(names) // 40))
        return [list(names[i : i + height]) for i in range(0, len(names), height)]
    found: list[list[str]] = []
    for part, members in parts.items():
        found += columns(part, members, most) if len(members) > most else [members]
    return found


def in_order(*sequences: Iterable[str]) -> list[str]:
    """Names of several sequences, each in the order of the model, as one such sequence.

    What no sequence tells stays beside its like, in the order of its numbers.

    >>> in_order(["conv1", "layer1.0.conv1", "layer1.0.downsample", "layer1.1.conv1"], ["layer1.0.conv2", "layer1.1.conv2"])
    ['conv1', 'layer1.0.conv1', 'layer1.0.conv2', 'layer1.0.downsample', 'layer1.1.conv1', 'layer1.1.conv2']
    """
    return _merged("", [list(sequence) for sequence in sequences])


def ranges(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ in one number alone as one, as shells write it; each with the names that it stands for.

    >>> list(ranges(["stem", *(f"layer3.{i}.conv{j}" for i in range(23) for j in (1, 3)), "layer4.0.conv1", "layer4.2.conv1"]))
    ['stem', 'layer3.{0..22}.conv1', 'layer3.{0..22}.conv3', 'layer4.{0,2}.conv1']
    """
    by_kind: dict[str, list[str]] = {}
    for name in names:
        by_kind.setdefault(_kind(name), []).append(name)
    found: dict[str, list[str]] = {}
    for alike in by_kind.values():
        positions = range(len(re.findall(r"\d+", alike[0])))
        foldings: list[dict[str, list[str]]] = [_folded(alike, position) for position in positions]
        shortest = min(foldings, key=len, default={name: [name] for name in alike})
        found.update(shortest)
    return found


def _folded(names: Iterable[str], position: int) -> dict[str, list[str]]:
    """Names that differ in the number at one position alone as one."""
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        number = list(re.finditer(r"\d+", name))[position]
        value = int(number[0])
        plain = number[0] == str(value)  # a range says nothing of leading zeros, nor of other digits than 0 to 9
        around = (name[: number.start()], name[number.end() :]) if plain else (name, "")
        groups.setdefault(around, {})[value] = name
    found = {}
    for (before, after), members in groups.items():
        alike = list(members.values())
        found[f"{before}{_braces(sorted(members))}{after}" if len(alike) > 1 else alike[0]] = alike
    return found


def _braces(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return "{" + ",".join(parts) + "}"


def _merged(prefix: str, sequences: list[list[str]]) -> list[str]:
    split = [_split(prefix, names) for names in sequences]
    waiting = [list(groups) for groups in split]
    merged: list[str] = []
    last = None
    while any(waiting):
        heads = [queue[0] for queue in waiting if queue]
        free = [head for head in heads if not any(head in queue[1:] for queue in waiting)] or heads
        kinds = [_kind(head) for head in free]
        kind = last if last in kinds else kinds[0]
        chosen = min((head for head in free if _kind(head) == kind), key=_natural)
        members = [groups[chosen] for groups in split if chosen in groups]
        alone = len(members) == 1 or any(chosen in names for names in members)
        merged += dict.fromkeys(name for names in members for name in names) if alone else _merged(chosen, members)
        waiting = [[head for head in queue if head != chosen] for queue in waiting]
        last = kind
    return merged


def _split(prefix: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Names that begin with `prefix`, by the prefixes of one component more; a name that ends there is one of its own."""
    depth = len(prefix.split(".")) + 1 if prefix else 1
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(".".join(name.split(".")[:depth]), []).append(name)
    return groups


def _kind(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(number or 0), text) for text, number in re.findall(r"(\D*)(\d*)", name)]
