"""Criteria: the options that leave Conv2d layers without a block, one small function each, in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from se_fx.arguments import is_count
from se_fx.errors import SqueezeExciteError, shown
from se_fx.patterns import check_each_matches, matches

__all__ = ["AUTO", "CRITERIA", "Candidate", "Candidates", "Criterion", "Where", "least_channels"]

AUTO = 512  # output channels from which blocks pay in models of ImageNet's scale
Where = Callable[[str, nn.Module], bool] | str | Sequence[str] | None


@dataclass(frozen=True)
class Candidate:
    """A Conv2d that may get a block.

    Attributes:
        conv: the module.
        channels: of the value that a block there would scale; of the conv's output where the placement has no block.
    """

    conv: nn.Conv2d
    channels: int


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
}
