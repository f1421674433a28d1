"""Plans: which blocks go where, as plain data that can be looked at, cut to a budget, saved and read back."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from se_fx.arguments import is_number
from se_fx.cost import NO_COST, Cost, Measurement, measure
from se_fx.errors import SqueezeExciteError, shown
from se_fx.insertion import block_names
from se_fx.names import check_each_matches, matches
from se_fx.planning.site import Site, Skip, site_from_dict, site_to_dict
from se_fx.planning.tables import site_table

__all__ = ["Callables", "Plan", "costed", "give_plan", "plan_of", "plan_within", "take_plans"]

_VERSION = 1
MOST_SITES = 2**16  # more than any network has; a plan from elsewhere may say it has any number
_ATTRIBUTE = "_squeeze_excite_plan"  # of a rewritten model

#: The caller's own policies, blocks, gates and activations, by field of `Site` and the name it has there.
Callables = Mapping[tuple[str, str], Callable[..., Any]]


@dataclass(frozen=True)
class Plan:
    """The sites of one model, in the order of its modules.

    Attributes:
        sites: the blocks to insert.
        skipped: the other Conv2d layers, each with the reason. Not saved.
        opaque: parts of the model that run their own code, with the reason. Not saved.
        alone: convs that such code calls, each captured alone. Not saved.
        base: cost of the model itself; its parameters alone without example inputs. Not saved.
        measured: whether costs were counted on example inputs.
        callables: the caller's own functions that sites name. Not saved, nor pickled.

    Raises:
        SqueezeExciteError: `sites` are no tuple of sites, or have a name twice.
    """

    sites: tuple[Site, ...]
    skipped: tuple[Skip, ...] = ()
    opaque: tuple[tuple[str, str], ...] = ()
    alone: tuple[str, ...] = ()
    base: Cost = field(default=NO_COST, compare=False)
    measured: bool = field(default=False, compare=False)
    callables: Callables = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.sites, tuple) or not all(isinstance(site, Site) for site in self.sites):
            raise SqueezeExciteError(f"plan's sites={shown(self.sites)}: expected a tuple of Sites")
        twice = next((name for name, count in Counter(site.name for site in self.sites).items() if count > 1), None)
        if twice is not None:
            raise SqueezeExciteError(f"plan's sites: expected each site once, and got {shown(twice)} twice")

    def __len__(self) -> int:
        return len(self.sites)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "callables": {}}

    @classmethod
    def of(cls, rewritten: Any) -> Plan:
        """The plan that a rewritten model carries.

        Raises:
            SqueezeExciteError: the model isn't a rewritten one.
        """
        found = plan_of(rewritten) if isinstance(rewritten, nn.Module) else None
        if found is None:
            kind, modules = type(rewritten).__name__, rewritten.named_modules() if isinstance(rewritten, nn.Module) else ()
            inner = next((name for name, module in modules if plan_of(module) is not None), None)
            advice = "call se_fx.transform first" if inner is None else f"pass its .{inner}"
            raise SqueezeExciteError(f"rewritten: expected a model that se_fx has rewritten, and got {kind}; {advice}")
        return found

    @property
    def added(self) -> Cost:
        """What all blocks add."""
        return sum((site.cost for site in self.sites), NO_COST)

    def __str__(self) -> str:
        counts = (len(self), "site"), (len(self.skipped), "Conv2d layer")
        summary = ", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in counts) + " skipped"
        return summary + (f"\n{site_table(self.sites, self.base if self.measured else None)}" if self.sites else "")

    # ------------------------------------------------------------------------------------------------------ smaller plans
    def within(
        self, *, flops: float | None = None, params: float | None = None, bytes: float | None = None, by: str | None = None
    ) -> Plan:
        """The most blocks that a budget allows: the cheapest first and, of equally cheap ones, the later first.

        Since blocks don't influence each other's cost, no other set that fits has more blocks, and none with as many
        costs less. Several budgets at once are all kept to; a block's cost is then the largest share that it takes of any of
        them, and the set is one that no block can be added to, though not always the largest.

        With ``by="score"``, those that are worth most for their cost: by their score's ratio to their cost, the highest first,
        as far as each still fits.

        Args:
            flops: FLOPs that all blocks together may add: a number, or a fraction in (0, 1) of the model's own.
            params: likewise, parameters.
            bytes: likewise, bytes moved.
            by: "score", by the scores that `se_fx.score` has given the sites; None, by cost alone.

        Raises:
            SqueezeExciteError: no budget is given, one is no such number, or the costs, or scores, it needs aren't known.
        """
        if by not in (None, "score"):
            raise SqueezeExciteError(f"by={shown(by)}: expected None, or 'score'")
        if by and any(site.score is None for site in self.sites):
            raise SqueezeExciteError(
                "by='score': this plan's sites have no scores; get some with se_fx.score(model, plan, ...)"
            )
        given = {"flops": flops, "params": params, "bytes": bytes}
        limits = {name: self._limit(name, value) for name, value in given.items() if value is not None}
        if not limits:
            raise SqueezeExciteError("within: expected a budget, flops=, params= or bytes=")

        def share(position: int) -> float:
            cost = self.sites[position].cost
            return max(float(getattr(cost, name) / max(limit, 1e-9)) for name, limit in limits.items())

        def order(position: int) -> tuple[float, float, int]:
            score = self.sites[position].score if by else None
            return (-score / max(share(position), 1e-9) if score is not None else 0.0, share(position), -position)

        kept: set[str] = set()
        spent = NO_COST
        for position in sorted(range(len(self)), key=order):
            site = self.sites[position]
            if all(getattr(spent + site.cost, name) <= limit for name, limit in limits.items()):
                kept.add(site.name)
                spent += site.cost
        budget = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        return self._keep(kept, f"over the budget of {budget}")

    def _limit(self, name: str, value: Any) -> float:
        if not is_number(value) or not 0 <= value < math.inf or (value > 1 and value != int(value)):
            raise SqueezeExciteError(
                f"{name}={shown(value)}: expected a number of {name}, an integer >= 0, or a fraction in (0, 1) of the "
                "model's own"
            )
        if name != "params" and not self.measured:
            raise SqueezeExciteError(
                f"{name}: this plan has no costs yet; make it with se_fx.plan(model, example_inputs=...), then cut it"
            )
        if not 0 < value < 1:
            return float(value)
        if not self.base.params:
            raise SqueezeExciteError(f"{name}={value!r}: this plan doesn't know its model's cost; pass a number of {name}")
        return float(value * getattr(self.base, name))

    def only(self, *patterns: str) -> Plan:
        """The sites whose names match any of these glob patterns."""
        return self._keep(self._matching(patterns))

    def without(self, *patterns: str) -> Plan:
        """The sites whose names match none of these glob patterns.

        >>> plan = Plan((Site("stem", 64, 4), Site("layer1.0.conv1", 64, 4), Site("layer2.0.conv1", 128, 8)))
        >>> [site.name for site in plan.without("layer1.*", "stem").sites]
        ['layer2.0.conv1']
        """
        return self._keep(self._names - self._matching(patterns))

    @property
    def _names(self) -> set[str]:
        return {site.name for site in self.sites}

    def _matching(self, patterns: Iterable[str]) -> set[str]:
        names = [site.name for site in self.sites]
        check_each_matches(patterns, names, "patterns", "site of this plan")
        return {name for name in names if matches(name, patterns)}

    def _keep(self, names: set[str], reason: str = "taken out of the plan") -> Plan:
        sites = tuple(site for site in self.sites if site.name in names)
        dropped = tuple(Skip(site.name, site.channels, reason) for site in self.sites if site.name not in names)
        return dataclasses.replace(self, sites=sites, skipped=(*self.skipped, *dropped))

    def __or__(self, other: Plan) -> Plan:
        """The sites of both plans; where both have one of the same name, that of the first. All else is the second's."""
        if not isinstance(other, Plan):
            return NotImplemented
        names = self._names
        clashes = {key for key in self.callables if other.callables.get(key, self.callables[key]) is not self.callables[key]}
        callables = {key: value for key, value in {**self.callables, **other.callables}.items() if key not in clashes}
        sites = (*self.sites, *(site for site in other.sites if site.name not in names))
        skipped = tuple(skip for skip in other.skipped if skip.name not in names)
        return dataclasses.replace(other, sites=sites, skipped=skipped, callables=callables)

    def __sub__(self, other: Plan) -> Plan:
        """The sites of this plan that the other has none of the same name for."""
        if not isinstance(other, Plan):
            return NotImplemented
        return self._keep(self._names - other._names)

    # ------------------------------------------------------------------------------------------------------------ as JSON
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types. What depends on example inputs (spatial size, costs) and what was skipped is left out.

        Own policies, blocks, gates and activations are saved by name; see `from_dict`.
        """
        return {"version": _VERSION, "sites": [site_to_dict(site) for site in self.sites]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` saved.

        Names are looked up in `se_fx.placement.PLACEMENTS` and, in `se_fx.blocks`, `BLOCKS`, `GATES` and `ACTIVATIONS`;
        add your own there to read plans that name them. Nothing in a plan is ever imported or run.

        Raises:
            SqueezeExciteError: `data` is no such thing, from a later version, or has unknown names, or sizes that no block has.
        """
        version = data.get("version") if isinstance(data, Mapping) else None
        if type(version) is not int or version != _VERSION:
            raise SqueezeExciteError(
                f"plan: expected what Plan.to_dict() returns, of version {_VERSION}, and got version {shown(version)}; "
                "upgrade se_fx if a later one has saved it"
            )
        sites = data.get("sites")
        if not isinstance(sites, list) or not all(isinstance(site, Mapping) for site in sites):
            raise SqueezeExciteError("plan['sites']: expected a list of sites, each a mapping")
        if len(sites) > MOST_SITES:
            raise SqueezeExciteError(f"plan['sites']: expected at most {MOST_SITES} sites, and got {len(sites)}")
        if set(data) != {"version", "sites"}:
            raise SqueezeExciteError(f"plan: expected the keys version and sites alone; got {shown(list(data))}")
        return cls(tuple(site_from_dict(f"plan['sites'][{i}]", site) for i, site in enumerate(sites)))


# -------------------------------------------------------------------------------------------------------- carried by models
def plan_of(model: nn.Module) -> Plan | None:
    """The plan that a rewritten model carries; None for other models."""
    plan = model.__dict__.get(_ATTRIBUTE)
    return plan if isinstance(plan, Plan) else None


def plan_within(model: nn.Module) -> Plan:
    """The sites that a model has already, of its own plan and of those of modules within it, under their names here."""
    found = plan_of(model) or Plan(())
    for path, module in model.named_modules():
        inner = plan_of(module) if path else None
        if inner is not None:
            sites = tuple(dataclasses.replace(site, name=f"{path}.{site.name}".rstrip(".")) for site in inner.sites)
            found |= Plan(sites, callables=inner.callables)
    return found


def give_plan(model: nn.Module, plan: Plan | None) -> None:
    """Have `model` carry `plan`, or none."""
    model.__dict__.pop(_ATTRIBUTE, None)
    if plan is not None:
        model.__dict__[_ATTRIBUTE] = plan


def take_plans(model: nn.Module) -> None:
    """Have neither `model` nor any module within it carry a plan."""
    for module in model.modules():
        give_plan(module, None)


def costed(rewritten: nn.Module, example_inputs: Any) -> tuple[Plan, Measurement]:
    """The plan that `rewritten` carries with sizes and costs, and the measurement they come from."""
    known = Plan.of(rewritten)
    measurement = measure(rewritten, example_inputs, block_names(rewritten))
    sites = []
    for site in known.sites:
        shape = measurement.shapes.get(site.name)
        spatial = (shape[-2], shape[-1]) if shape else None
        sites.append(dataclasses.replace(site, spatial=spatial, cost=measurement.parts.get(site.name, site.cost)))
    base = measurement.total - sum((site.cost for site in sites), NO_COST)
    return dataclasses.replace(known, sites=tuple(sites), base=base, measured=True), measurement
