"""Criteria: the options that leave Conv2d layers without a block, one small function each, in a table."""

from __future__ import annotations

from argparse import BooleanOptionalAction
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import nn

from se_fx.arguments import is_count
from se_fx.errors import SqueezeExciteError, shown
from se_fx.names import check_each_matches, matches

__all__ = ["AUTO", "CRITERIA", "Candidate", "Candidates", "Criterion", "Stages", "Surroundings", "Where", "least_channels"]

AUTO = 512  # output channels from which blocks pay in models of ImageNet's scale
Where = Callable[[str, nn.Module], bool] | str | Sequence[str] | None
Stages = int | str | Sequence[int | str] | None


@dataclass(frozen=True)
class Surroundings:
    """Where in a network a Conv2d is; `docs/plans.md` says what stages and necks are.

    Attributes:
        stage: the number of its stage, from 0 on; None in necks, and where it isn't in the network's trunk.
        in_neck: whether it belongs to a neck or a decoder.
        stride: the total stride of what it returns, from the input of its part, a power of two; None where that can't be told.
    """

    stage: int | None = None
    in_neck: bool = False
    stride: int | None = None


@dataclass(frozen=True)
class Candidate:
    """A Conv2d that may get a block.

    Attributes:
        conv: the module.
        channels: of the value that a block there would scale; of the conv's output where the placement has no block.
        look: finds its `surroundings`.
    """

    conv: nn.Conv2d
    channels: int
    look: Callable[[], Surroundings] = field(default=Surroundings, repr=False, compare=False)

    @property
    def surroundings(self) -> Surroundings:
        """Where in the network it is. Found when first asked for, for all convs, which takes about as long as capture."""
        return self.look()


Candidates = Mapping[str, Candidate]


@dataclass(frozen=True)
class Criterion:
    """An option that says which convs get no block.

    Attributes:
        default: its value where none is given.
        expected: what it may be, for errors.
        accepts: whether a value is that.
        excludes: the convs that a value leaves out, of all those of a model by qualified name, each with the reason; it
            raises `SqueezeExciteError` where the value is nothing for this model.
        argument: how the command line takes it: the keywords of `argparse.ArgumentParser.add_argument`; none if it doesn't.
    """

    default: Any
    expected: str
    accepts: Callable[[Any], bool]
    excludes: Callable[[Any, Candidates], Mapping[str, str]]
    argument: Mapping[str, Any] = field(default_factory=dict)

    def check(self, name: str, value: Any) -> None:
        """Raise `SqueezeExciteError` where `value` isn't what is expected of the option of this name."""
        if not self.accepts(value):
            raise SqueezeExciteError(f"{name}={shown(value)}: expected {self.expected}")


# ---------------------------------------------------------------------------------------------------------- min_channels
def least_channels(value: int | str, channels: Sequence[int]) -> int:
    """`min_channels` for convs of so many output channels: "auto" is 512, or their largest count if none has as many."""
    return min(AUTO, max(channels)) if value == "auto" else int(value)


def _too_few_channels(value: int | str, candidates: Candidates) -> dict[str, str]:
    least = least_channels(value, [each.conv.out_channels for each in candidates.values()])
    return {
        name: f"{each.channels} {'output ' * (each.channels == each.conv.out_channels)}channels < min_channels={least}"
        for name, each in candidates.items()
        if each.channels < least
    }


def _count_or_text(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


# ----------------------------------------------------------------------------------------------------------------- where
def _is_where(value: Any) -> bool:
    is_patterns = isinstance(value, Sequence) and len(value) > 0 and all(isinstance(each, str) for each in value)
    return value is None or callable(value) or is_patterns


def _unwanted(value: Where, candidates: Candidates) -> dict[str, str]:
    if value is None:
        return {}
    if callable(value):
        wanted = {name for name, each in candidates.items() if value(name, each.conv)}
    else:
        patterns = [value] if isinstance(value, str) else list(value)
        exclude = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
        include = [pattern for pattern in patterns if not pattern.startswith("!")]
        check_each_matches([*include, *exclude], candidates, f"where={value!r}", "Conv2d")
        wanted = {name for name in candidates if matches(name, include or ["*"]) and not matches(name, exclude)}
    return dict.fromkeys(candidates.keys() - wanted, "excluded by where")


# ---------------------------------------------------------------------------------------------------------------- stages
def _is_stages(value: Any) -> bool:
    each = value if isinstance(value, (list, tuple)) else [value]
    return value is None or (len(each) > 0 and all(_is_stage(stage) for stage in each))


def _is_stage(value: Any) -> bool:
    return (isinstance(value, str) and value != "") or (isinstance(value, int) and not isinstance(value, bool))


def _of_other_stages(value: Stages, candidates: Candidates) -> dict[str, str]:
    if value is None or not candidates:
        return {}
    chosen = [value] if isinstance(value, (int, str)) else list(value)
    wanted = {name for stage in chosen for name in _in_stage(stage, value, candidates)}
    return dict.fromkeys(candidates.keys() - wanted, "excluded by stages")


def _in_stage(stage: int | str, value: Stages, candidates: Candidates) -> list[str]:
    if isinstance(stage, str) and stage != "last":
        found = [name for name in candidates if name == stage or name.startswith(f"{stage}.")]
        fault = f"no module of this name holds a Conv2d; stages are {_listed(candidates)}"
    else:
        by_number = _by_number(candidates)
        number = -1 if stage == "last" else int(stage)
        found = by_number[number] if -len(by_number) <= number < len(by_number) else []
        fault = f"there are {len(by_number)}: {_listed(candidates)}"
    if not found:
        raise SqueezeExciteError(f"stages={shown(value)}: {shown(stage)}: {fault}")
    return found


def _by_number(candidates: Candidates) -> list[list[str]]:
    """The names of the convs of each stage."""
    found: dict[int, list[str]] = {}
    for name, each in candidates.items():
        if each.surroundings.stage is not None:
            found.setdefault(each.surroundings.stage, []).append(name)
    return [found[number] for number in sorted(found)]


def _listed(candidates: Candidates) -> str:
    """The stages, each with the prefix that its convs alone have, else with the first and the last of them."""
    listed = []
    for number, names in enumerate(_by_number(candidates)):
        prefix = _common_prefix(names)
        alone = prefix and all(name in names or not name.startswith(f"{prefix}.") for name in candidates)
        described = prefix if alone else f"{names[0]} to {names[-1]}"
        listed.append(f"{number} ({described})")
    return ", ".join(listed)


def _common_prefix(names: Sequence[str]) -> str:
    first, last = (name.split(".") for name in (min(names), max(names)))
    same = [one for one, other in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
    return ".".join(same)


# ----------------------------------------------------------------------------------------------------------------- necks
def _in_necks_or_not(value: bool | None, candidates: Candidates) -> dict[str, str]:
    if value is None:
        return {}
    found = {name for name, each in candidates.items() if each.surroundings.in_neck}
    if value:
        return dict.fromkeys(candidates.keys() - found, "is in no neck")
    return dict.fromkeys(found, "is in a neck")


#: Criteria by name, in the order in which reasons are given where several leave a conv out.
CRITERIA: dict[str, Criterion] = {
    "min_channels": Criterion(
        default=128,
        expected='the least number of output channels a Conv2d needs, an integer >= 1, or "auto"',
        accepts=lambda value: value == "auto" if isinstance(value, str) else is_count(value),
        excludes=_too_few_channels,
        argument={"type": _count_or_text, "metavar": "N", "help": 'least output channels of a conv, or "auto" (default: 128)'},
    ),
    "where": Criterion(
        default=None,
        expected="a predicate (name, module) -> bool, or glob patterns of qualified names such as 'layer4.*' "
        "('!layer4.0.*' excludes)",
        accepts=_is_where,
        excludes=_unwanted,
        argument={"action": "append", "metavar": "GLOB", "help": "only convs named so; '!GLOB' excludes; repeatable"},
    ),
    "stages": Criterion(
        default=None,
        expected='"last", a number from 0 on (-1 is the last), the name of a module such as "layer4", or a list of these',
        accepts=_is_stages,
        excludes=_of_other_stages,
        argument={
            "action": "append",
            "type": _count_or_text,
            "metavar": "STAGE",
            "help": 'only convs of this stage: "last", its number (0 is the first, -1 the last), or a module; repeatable',
        },
    ),
    "necks": Criterion(
        default=None,
        expected="True for convs of necks and decoders alone, False for all others, or None for both",
        accepts=lambda value: value is None or isinstance(value, bool),
        excludes=_in_necks_or_not,
        argument={"action": BooleanOptionalAction, "help": "only convs of necks and decoders; with --no-necks, none of them"},
    ),
}
