"""Folding: blocks whose gate is constant over data are removed, the gate going into the weights before them.

conv ─ norm ─ block ─ relu          conv ─ norm' ─ relu        norm'.weight = gate * norm.weight
              └ gate: always g   ▶                             norm'.bias   = gate * norm.bias
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

from se_fx.arguments import check_flag, is_number
from se_fx.blocks import SqueezeExcite2d
from se_fx.capture import capture, check_whole
from se_fx.cost import NO_COST, Cost, as_batches
from se_fx.errors import SqueezeExciteError, shown
from se_fx.insertion import block_names, insert, insert_in_place, withdraw
from se_fx.measure.changes import Changes, compare
from se_fx.measure.gates import GateProfile, SiteGates
from se_fx.measure.wiring import Kept, Wiring
from se_fx.planning import Plan, Skip, fit, give_plan, take_plans
from se_fx.regions import clone, graphs_of

__all__ = ["FoldedSite", "Folding", "KeptSite", "fold_gates"]


@dataclass(frozen=True)
class FoldedSite:
    """A block that is gone.

    Attributes:
        name: the site's name.
        into: qualified name of the conv or norm whose weights took the gate.
        spread: the largest standard deviation, over samples, of any channel's gate.
        deviation: the largest distance of any class's mean gate from the mean over all samples, over channels; None where
            the profile was made without labels.
        saved: what the block cost: as measured, if the model's plan was, else its parameters alone.
    """

    name: str
    into: str
    spread: float
    deviation: float | None
    saved: Cost


@dataclass(frozen=True)
class KeptSite:
    """A block that stays, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Folding:
    """What `fold_gates` did.

    Attributes:
        model: the model with fewer blocks.
        tolerance: how far gates were allowed to vary.
        folded: the blocks that are gone, in the order of the model's plan.
        kept: the others, each with the reason.
        changes: how far outputs move; None without held-out batches.
    """

    model: nn.Module = field(repr=False)
    tolerance: float
    folded: tuple[FoldedSite, ...]
    kept: tuple[KeptSite, ...]
    changes: Changes | None = None

    @property
    def saved(self) -> Cost:
        """What all folded blocks cost."""
        return sum((site.saved for site in self.folded), NO_COST)

    def __str__(self) -> str:
        columns: dict[str, list[Any]] = {"folded": [site.name for site in self.folded]}
        columns["into"] = [site.into for site in self.folded]
        columns["spread"] = [f"{site.spread:.4f}" for site in self.folded]
        if any(site.deviation is not None for site in self.folded):
            columns["over classes"] = ["-" if site.deviation is None else f"{site.deviation:.4f}" for site in self.folded]
        columns["parameters"] = [f"{site.saved.params:,}" for site in self.folded]
        if self.saved.macs:
            columns["MACs"] = [f"{site.saved.macs:,}" for site in self.folded]
        if self.changes is not None:
            columns["moves outputs by"] = [f"{self.changes.alone[site.name]:.3g}" for site in self.folded]
        align = ["left", "left", *["right"] * (len(columns) - 2)]
        total = len(self.folded) + len(self.kept)
        parts = [f"{len(self.folded)} of {total} block{'s' * (total != 1)} folded within {self.tolerance:g}, "]
        parts[0] += f"{self.saved.params:,} parameters saved."
        parts += [tabulate(columns, headers="keys", disable_numparse=True, colalign=align)] if self.folded else []
        kept = [(site.name, site.reason) for site in self.kept]
        parts += [tabulate(kept, ["kept", "because"], disable_numparse=True)] if kept else []
        return "\n\n".join([*parts, *([str(self.changes)] if self.changes else [])])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the model."""
        return {
            "tolerance": self.tolerance,
            "folded": [dataclasses.asdict(site) for site in self.folded],
            "kept": [dataclasses.asdict(site) for site in self.kept],
            "changes": None if self.changes is None else self.changes.to_dict(),
        }


def fold_gates(
    rewritten: nn.Module,
    profile: GateProfile,
    tolerance: float = 0.02,
    *,
    held_out: Iterable[Any] | None = None,
    progress: bool = True,
) -> Folding:
    """Remove the blocks whose gate does not depend on its input, and scale by their mean gate the weights before them.

    A gate is constant where *every* channel's is: its standard deviation over the samples is at most `tolerance` and, if
    the profile has classes, so is the distance of each class's mean from the mean over all. (A class of few samples
    hardly shows in a standard deviation.) Both are absolute, in units of the gate, which is in [0, 1], or in [0, 2] with
    ``init="identity"``. That is said of the profile's data, not of other data: see what `held_out` shows.

    The mean gate of each channel goes into the weight and bias of the conv or norm that computes the value the block
    scales. That takes a plain Conv2d, BatchNorm2d, SyncBatchNorm, GroupNorm or InstanceNorm2d with weights of its own
    (not parametrized, not tied, not used in another way), without hooks, called once, and read by the block alone; else
    the block is kept. A block that hangs on its conv, as those of `apply_squeeze_excite` do, acts at each of its calls, so
    these may be many. What code that was not captured does with a conv beyond calling it can't be seen.

    The result shares everything with `rewritten`, which is left as it is, but for new Parameters, under the same keys, in
    the modules that took a gate; optimizers must be made anew. It carries the plan of the blocks that are left, and
    `remove` takes these out too, and leaves the scaled weights.

    Args:
        rewritten: what `transform` or `apply_squeeze_excite` made of a model, trained.
        profile: what `profile_gates` found for it. Sites that were taken out of the profile are kept.
        tolerance: how far gates may vary, >= 0.
        held_out: batches as `profile_gates` takes them, to compare outputs on before and after, in eval mode. With labels,
            accuracies too. They are held in memory.
        progress: show a progress bar on stderr while outputs are compared, if tqdm is installed.

    Raises:
        SqueezeExciteError: the model isn't a rewritten one, or is sharded since, the profile isn't of this model, `tolerance`
            is no such number, or `held_out` has no batch.

    >>> import se_fx, torch
    >>> net = se_fx.transform(nn.Sequential(nn.Conv2d(3, 8, 3)), min_channels=1, init="identity")
    >>> x = torch.randn(4, 3, 8, 8)
    >>> print(fold_gates(net, se_fx.profile_gates(net, [x], progress=False), held_out=[x], progress=False))
    1 of 1 block folded within 0.02, 1,024 parameters saved.
    <BLANKLINE>
    folded    into      spread    parameters    moves outputs by
    --------  ------  --------  ------------  ------------------
    0         0         0.0000         1,024                   0
    <BLANKLINE>
    On held-out batches outputs move by at most 0, 0 of their standard deviation.
    """
    plan = Plan.of(rewritten)
    check_whole(rewritten)
    _check_tolerance(tolerance)
    gates = _fitting(profile, rewritten, plan)
    batches = None if held_out is None else _listed(held_out)
    check_flag("progress", progress)
    wiring = Wiring(rewritten, capture(rewritten))
    folded: list[FoldedSite] = []
    kept: list[KeptSite] = []
    for site in plan.sites:
        try:
            spread, deviation = _constant(gates.get(site.name), tolerance)
            folded.append(FoldedSite(site.name, wiring.producer(site.name), spread, deviation, site.cost))
        except Kept as kept_because:
            kept.append(KeptSite(site.name, str(kept_because)))
    folding = _Surgery(rewritten, plan, gates)
    model = folding.without(folded)
    changes = None
    if batches is not None:
        alone = {site.name: folding.without([site]) for site in folded}
        changes = compare(rewritten, model, alone, batches, progress)
    return Folding(model, float(tolerance), tuple(folded), tuple(kept), changes)


# ------------------------------------------------------------------------------------------------------------- arguments
def _check_tolerance(tolerance: Any) -> None:
    if not is_number(tolerance) or not 0 <= tolerance < math.inf:
        raise SqueezeExciteError(
            f"tolerance={shown(tolerance)}: expected how far gates may vary, a number >= 0 in units of the gate, such as 0.02"
        )


def _fitting(profile: Any, rewritten: nn.Module, plan: Plan) -> dict[str, SiteGates]:
    """The profile's sites by name, each of which must have a block of se_fx's own in the model."""
    if not isinstance(profile, GateProfile):
        raise SqueezeExciteError(
            f"profile={type(profile).__name__}: expected a GateProfile; call se_fx.profile_gates(model, batches)"
        )
    paths = block_names(rewritten)
    for gates in profile.sites:
        block = rewritten.get_submodule(paths[gates.name]) if gates.name in paths else None
        why = "this model has no block of se_fx's own there"
        if isinstance(block, SqueezeExcite2d):
            why = f"the profile has {len(gates.channel_means)} channels there, this model {block.num_features}"
            why = "" if len(gates.channel_means) == block.num_features else why
        if why:
            raise SqueezeExciteError(
                f"profile: site {gates.name!r} does not fit: {why}; call se_fx.profile_gates on the model to be folded"
            )
    return {gates.name: gates for gates in profile.sites}


def _listed(held_out: Any) -> list[Any]:
    batches = list(as_batches(held_out, "held_out"))
    if not batches:
        raise SqueezeExciteError("held_out: expected at least one batch, and there was none")
    return batches


# ---------------------------------------------------------------------------------------------------------- what is legal
def _constant(gates: SiteGates | None, tolerance: float) -> tuple[float, float | None]:
    """How far a site's gates spread over samples, and over classes, if they are constant within `tolerance`."""
    if gates is None:
        raise Kept("the profile has no gates for it")
    if gates.samples < 2:
        number = "one sample" if gates.samples else "no sample"
        raise Kept(f"it was reached by {number} of the profile's data, which shows no spread")
    spread = float(gates.channel_spreads.max())
    distances = [float((means - gates.channel_means).abs().max()) for means in gates.class_means.values()]
    if not all(map(math.isfinite, (spread, *distances, *gates.channel_means.tolist()))):
        raise Kept("some of its gates are not finite")
    if spread > tolerance:
        raise Kept(f"its gates' spread over samples is up to {spread:.4f}")
    if distances and max(distances) > tolerance:
        raise Kept(f"a class's mean gate is up to {max(distances):.4f} off the mean")
    return spread, max(distances) if distances else None


# ---------------------------------------------------------------------------------------------------------------- surgery
class _Surgery:
    """Takes blocks out of copies of a rewritten model, and their gates into the weights before."""

    def __init__(self, rewritten: nn.Module, plan: Plan, gates: Mapping[str, SiteGates]) -> None:
        self.rewritten, self.plan, self.gates = rewritten, plan, gates
        self.in_place = graphs_of(rewritten) is None
        self.bare = _without_blocks(rewritten)
        self.choice = fit(capture(self.bare), plan)

    def without(self, folded: Iterable[FoldedSite]) -> nn.Module:
        """A copy without the blocks of `folded`."""
        folded = list(folded)
        gone = {site.name for site in folded}
        bare = clone(self.bare)
        for site in folded:
            _scale(bare.get_submodule(site.into), self.gates[site.name].channel_means)
        paths = block_names(self.rewritten)
        left = {site.name: self.rewritten.get_submodule(paths[site.name]) for site in self.plan.sites if site.name not in gone}
        captured = dataclasses.replace(self.choice.capture, model=bare)
        if self.in_place:
            insert_in_place(captured, self.choice.insertions_of(left))
        model = bare if self.in_place else insert(captured, self.choice.insertions_of(left))
        give_plan(model, _plan_after(self.plan, folded))
        return model


def _without_blocks(rewritten: nn.Module) -> nn.Module:
    bare = clone(rewritten)
    for module in list(bare.modules()):
        withdraw(module)
    take_plans(bare)
    return bare


def _plan_after(plan: Plan, folded: Iterable[FoldedSite]) -> Plan:
    """`plan` without the blocks of `folded`, which it says are skipped."""
    names = {site.name for site in folded}
    gone = tuple(
        Skip(site.name, site.channels, "its gate was constant, and is folded") for site in plan.sites if site.name in names
    )
    left = tuple(site for site in plan.sites if site.name not in names)
    return dataclasses.replace(plan, sites=left, skipped=(*plan.skipped, *gone))


def _scale(module: nn.Module, gate: Tensor) -> None:
    """Scale what `module` returns by `gate`, (C,), one for each channel: by new Parameters."""
    for name in ("weight", "bias"):
        old = module._parameters[name]
        if old is not None:
            new = old.detach().cpu().double() * gate.reshape(-1, *[1] * (old.ndim - 1))
            setattr(module, name, nn.Parameter(new.to(old.device, old.dtype), old.requires_grad))
