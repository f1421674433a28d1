"""Options: what `transform` and `plan` can be told, checked before anything else happens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from se_fx.blocks import BLOCKS, MOST_CHANNELS, SqueezeExcite2d
from se_fx.criteria import CRITERIA
from se_fx.errors import SqueezeExciteError, hint, shown
from se_fx.names import matches
from se_fx.placement import PLACEMENTS, Policy

__all__ = ["BlockFactory", "Function", "Options", "Overrides"]

BlockFactory = Callable[[int], nn.Module]
Function = Callable[[Tensor], Tensor]  # of a block's hidden layer, or its gate
Overrides = Mapping[str, Mapping[str, Any]] | None


@dataclass(frozen=True)
class Options:
    """What `transform` and `plan` can be told; see `se_fx.transform`.

    Attributes:
        criteria: the values of the options in `CRITERIA`, all of them.

    Raises:
        SqueezeExciteError: a value is not among those expected.
    """

    latent_channels: float = 64
    placement: str | Policy = "conv"
    init: str = "default"
    bias: bool = False
    activation: str | Function = "relu"
    gate: str | Function = "sigmoid"
    block: str | BlockFactory | None = None
    overrides: Overrides = None
    criteria: Mapping[str, Any] = field(default_factory=lambda: {name: each.default for name, each in CRITERIA.items()})

    @classmethod
    def given(cls, **values: Any) -> Options:
        """The options of these values, criteria among them; all others have their defaults.

        Raises:
            SqueezeExciteError: there is no such option, or a value is not among those expected.
        """
        known = (*CRITERIA, *_DEFAULTS)
        for name in values:
            if name not in known:
                raise SqueezeExciteError(f"{name}: there is no such option; {hint(name, known, 'one of')}")
        criteria = {name: values.pop(name, each.default) for name, each in CRITERIA.items()}
        return cls(**values, criteria=criteria)

    def changed(self) -> list[str]:
        """The names of the options that don't have their defaults."""
        values = {**{name: getattr(self, name) for name in _DEFAULTS}, **self.criteria}
        defaults = {**_DEFAULTS, **{name: each.default for name, each in CRITERIA.items()}}
        return [name for name, value in values.items() if value != defaults[name]]

    def __post_init__(self) -> None:
        for name, value in self.criteria.items():
            CRITERIA[name].check(name, value)
        _check_choice("placement", self.placement, PLACEMENTS, "a policy (graph, root) -> spots")
        if self.block is not None:
            _check_choice("block", self.block, BLOCKS, "a factory channels -> nn.Module")
        SqueezeExcite2d(MOST_CHANNELS, **self._of_squeeze_excite(), device="meta")  # checks the rest
        changed = [name for name in _OF_SQUEEZE_EXCITE_ALONE if getattr(self, name) != _DEFAULTS[name]]
        if self.block is not None and changed:
            raise SqueezeExciteError(
                f"{changed[0]}: is for se_fx's own block, and not for block={shown(self.block)}: leave it out"
            )
        self._check_overrides()

    def of(self, name: str) -> Options:
        """The options for the site of this name, overrides applied: where several match, later ones win."""
        options = self
        for pattern, changes in (self.overrides or {}).items():
            if matches(name, [pattern]):
                options = options._changed(changes)
        return options

    def _changed(self, changes: Mapping[str, Any]) -> Options:
        to_another = {name: _DEFAULTS[name] for name in _OF_SQUEEZE_EXCITE_ALONE} if changes.get("block") is not None else {}
        return dataclasses.replace(self, **{**to_another, **changes, "overrides": None})

    def _of_squeeze_excite(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OF_SQUEEZE_EXCITE}

    def _check_overrides(self) -> None:
        if self.overrides is None:
            return
        if not isinstance(self.overrides, Mapping):
            raise SqueezeExciteError(
                f"overrides={shown(self.overrides)}: expected a dict from glob patterns of qualified names to dicts of "
                "options, such as {'layer4.*': {'latent_channels': 128}}"
            )
        for pattern, changes in self.overrides.items():
            allowed = (*_OF_SQUEEZE_EXCITE, "block")
            if not isinstance(pattern, str) or not isinstance(changes, Mapping) or set(changes) - set(allowed):
                raise SqueezeExciteError(
                    f"overrides[{shown(pattern)}]={shown(changes)}: expected, for a glob pattern, a dict of "
                    f"{', '.join(allowed)}"
                )
            try:
                self._changed(changes)
            except SqueezeExciteError as error:
                raise SqueezeExciteError(f"overrides[{shown(pattern)}]: {error}") from error


_OF_SQUEEZE_EXCITE_ALONE = ("latent_channels", "bias", "activation", "gate")
_OF_SQUEEZE_EXCITE = ("init", *_OF_SQUEEZE_EXCITE_ALONE)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Options) if field.name != "criteria"}


def _check_choice(name: str, value: Any, table: Mapping[str, Any], otherwise: str) -> None:
    if not (callable(value) or (isinstance(value, str) and value in table)):
        names = "".join(f"{choice!r}, " for choice in table)
        raise SqueezeExciteError(f"{name}={shown(value)}: expected {f'one of {names}or ' if names else ''}{otherwise}")
