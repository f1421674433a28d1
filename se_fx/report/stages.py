"""Stages: how the names of a stage's convs are drawn and listed, as people read them. Knows names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from se_fx.names import split

__all__ = ["columns", "in_order", "ranges"]


def columns(stage: str, names: Sequence[str], most: int = 8) -> list[list[str]]:
    """The names of one stage as columns of at most `most`: one for each of its blocks, where its blocks have several convs.

    >>> columns("layer1", ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"])
    [['layer1.0.conv1', 'layer1.0.conv2'], ['layer1.1.conv1', 'layer1.1.conv2']]
    >>> columns("features", ["features.0", "features.2", "features.5", "features.7", "features.10"])
    [['features.0', 'features.2', 'features.5', 'features.7'], ['features.10']]
    """
    parts = split(stage, names)
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
    groups_of = [split(prefix, names) for names in sequences]
    waiting = [list(groups) for groups in groups_of]
    merged: list[str] = []
    last = None
    while any(waiting):
        heads = [queue[0] for queue in waiting if queue]
        free = [head for head in heads if not any(head in queue[1:] for queue in waiting)] or heads
        kinds = [_kind(head) for head in free]
        kind = last if last in kinds else kinds[0]
        chosen = min((head for head in free if _kind(head) == kind), key=_natural)
        members = [groups[chosen] for groups in groups_of if chosen in groups]
        alone = len(members) == 1 or any(chosen in names for names in members)
        merged += dict.fromkeys(name for names in members for name in names) if alone else _merged(chosen, members)
        waiting = [[head for head in queue if head != chosen] for queue in waiting]
        last = kind
    return merged


def _kind(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(number or 0), text) for text, number in re.findall(r"(\D*)(\d*)", name)]
