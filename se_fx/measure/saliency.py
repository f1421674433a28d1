"""Saliency: how much a loss wants each gate to move, from gradients at gates that are all one. No training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, cast

import torch
from torch import Tensor, nn

from se_fx.capture import capture
from se_fx.cost import as_batches, as_call, calling
from se_fx.errors import SqueezeExciteError, blaming, shown
from se_fx.insertion import block_names, insert
from se_fx.measure.progress import progress_bar
from se_fx.planning import Plan, fit

__all__ = ["SALIENCIES", "score"]

_FEATURES = 256  # of a squeezed map that gates are taken to be a function of; more are mixed into so many


def score(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    *,
    saliency: str = "first_order",
    progress: bool = True,
) -> Plan:
    r"""How much the loss wants the gate of each of a plan's sites to move: the plan, with a `score` for each site.

    Each map at a site is scaled by gates that are all one, so outputs are the model's; the model runs in eval mode; and the
    gradient of each sample's loss with respect to its gates, :math:`d_n` of C channels, is what the score is made from. Nothing
    is trained, and the model is left as it is. Scores have the unit of the loss.

    ``saliency="first_order"``: how much the mean loss falls, to first order, for a unit step of the best gate that is one plus
    a linear function of the squeezed map, as an excitation is at the identity:

    .. math:: \left\| \frac{1}{N} \sum_n d_n \phi_n^\top \right\|_F, \quad
              \phi_n = \left[1, \frac{s_n - \mathrm{mean}(s_n)}{\mathrm{std}(s_n) \sqrt{C}}\right]

    with :math:`s_n` the means of the map's channels. What comes of the finite number of samples alone is taken off, so that
    sites with noisy gradients gain nothing by it: the square is estimated from pairs of different samples.

    ``saliency="fisher"``: the root of the mean of :math:`\|d_n\|^2`, what each sample wants, whether or not any one gate
    could do it for all of them.

    The first is the derivative along the block's own parameters at the identity, as in Molchanov et al., *Importance Estimation
    for Neural Network Pruning*, arXiv 1906.10771, equation 8, for something that isn't there yet. The second is the Fisher
    information of a gate, as in Theis et al., *Faster gaze prediction with dense networks and Fisher pruning*, arXiv
    1801.05787, equation 8.

    Args:
        model: the model without the blocks of `plan`.
        plan: where blocks could go; of what kind doesn't matter.
        batches: pairs of what to call the model with (a tensor, a tuple of positional or a dict of keyword arguments) and
            targets, such as data loaders yield.
        loss: from outputs and targets to the mean of the samples' losses, such as `torch.nn.functional.cross_entropy`.
        saliency: a name in `SALIENCIES`.
        progress: show a progress bar on stderr, if tqdm is installed.

    Raises:
        SqueezeExciteError: the plan doesn't fit the model, or the model has sites of it already; a batch is no such pair, or
            there is none; the loss is no number that depends on the maps.

    >>> import se_fx
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 2))
    >>> batch = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    >>> plan, loss = se_fx.plan(net, min_channels=1), nn.functional.cross_entropy
    >>> scored = score(net, plan, [batch], loss, saliency="fisher", progress=False)
    >>> scored.sites[0].score > 0
    True
    """
    if not isinstance(saliency, str) or saliency not in SALIENCIES:
        raise SqueezeExciteError(f"saliency={shown(saliency)}: expected one of {', '.join(map(repr, SALIENCIES))}")
    if not isinstance(plan, Plan):
        raise SqueezeExciteError(f"plan={shown(plan)}: expected a Plan, such as se_fx.plan(model) returns")
    if not callable(loss):
        raise SqueezeExciteError(f"loss={shown(loss)}: expected a function of outputs and targets, such as F.cross_entropy")
    given = as_batches(batches, "batches")
    probed, probes = _probed(model, plan)
    sums = {name: _Sums(probe.channels) for name, probe in probes.items()}
    total, count = len(given) if isinstance(given, Sized) else None, 0
    with torch.inference_mode(False), torch.enable_grad(), progress_bar("score", "batch", total, progress) as tick:
        for batch in given:
            count += _take_in(batch, probed, probes, loss, sums)
            tick()
    if not count:
        raise SqueezeExciteError("batches: expected at least one batch with a sample, and there was none")
    scores = {name: SALIENCIES[saliency](each, count) for name, each in sums.items()}
    return dataclasses.replace(plan, sites=tuple(dataclasses.replace(site, score=scores[site.name]) for site in plan.sites))


class _Probe(nn.Module):
    """Scales a map by gates that are all one, and keeps them with what they'd be computed from, call by call."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """`x`, bit for bit."""
        gate = torch.ones_like(x[..., :1, :1]).requires_grad_()
        self.calls.append((gate, x.detach().mean((-2, -1))))
        return x * gate


def _probed(model: nn.Module, plan: Plan) -> tuple[nn.Module, Mapping[str, _Probe]]:
    """A copy of `model` in eval mode, with probes at a plan's sites, and these by the sites' names."""
    name = f"{_Probe.__module__}.{_Probe.__qualname__}"
    sites = tuple(dataclasses.replace(site, block=name, latent_channels=None, init="default") for site in plan.sites)
    probing = dataclasses.replace(plan, sites=sites, callables={**plan.callables, ("block", name): _Probe})
    captured = capture(model)
    choice = fit(captured, probing)
    there = {site.name for site in plan.sites} - {site.name for site in choice.plan.sites}
    if there:
        raise SqueezeExciteError(
            f"model: it has a block at {shown(min(there))} already; score the model without blocks, se_fx.remove(model), or a "
            "plan without this site"
        )
    probed = insert(captured, choice.insertions()).eval()
    paths = block_names(probed)
    return probed, {site.name: cast("_Probe", probed.get_submodule(paths[site.name])) for site in plan.sites}


def _take_in(
    batch: Any, probed: nn.Module, probes: Mapping[str, _Probe], loss: Callable[[Any, Any], Tensor], sums: Mapping[str, _Sums]
) -> int:
    """Run one batch forward and backward; returns how many samples it has."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise SqueezeExciteError(f"batches: expected pairs of inputs and targets, and got {type(batch).__name__}")
    args, kwargs = call = as_call(batch[0], "batches: batch")
    samples = next((len(each) for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.ndim), 1)
    if not samples:
        return 0
    for probe in probes.values():
        probe.calls.clear()
    with calling("batches", call):
        outputs = probed(*args, **kwargs)
    with blaming("loss: it failed for the model's outputs and the targets of a batch"):
        value = loss(outputs, batch[1])
    calls = [(name, gate, squeezed) for name, probe in probes.items() for gate, squeezed in probe.calls]
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise SqueezeExciteError(
            f"loss: expected a single number that depends on the model's outputs, and got {shown(value)}; has the model a "
            "torch.no_grad() in it, or the loss a .detach()?"
        )
    gates = [gate for _, gate, _ in calls]
    found = torch.autograd.grad(value, gates, allow_unused=True) if gates else ()
    for (name, gate, squeezed), gradient in zip(calls, found, strict=True):
        if gradient is not None:
            sums[name].add(samples * gradient.reshape(-1, gate.shape[-3]), squeezed.reshape(-1, gate.shape[-3]))
    return samples


class _Sums:
    """Sums over samples from which scores follow, in float64 on the CPU."""

    def __init__(self, channels: int) -> None:
        self.mixing = None
        if channels > _FEATURES:
            signs = torch.randint(2, (channels, _FEATURES), generator=torch.Generator().manual_seed(0), device="cpu")
            self.mixing = (2 * signs - 1).double() / math.sqrt(_FEATURES)
        self.products = torch.zeros(channels, 1 + min(channels, _FEATURES), dtype=torch.float64, device="cpu")
        self.squares = self.own = 0.0

    def add(self, gradients: Tensor, squeezed: Tensor) -> None:
        """Take in what the loss of each sample wants, (N, C), and the squeezed maps, (N, C)."""
        wanted, features = gradients.double().cpu(), _features(squeezed.double().cpu(), self.mixing)
        self.products += wanted.T @ features
        self.squares += float(wanted.square().sum())
        self.own += float((wanted.square().sum(1) * features.square().sum(1)).sum())


def _features(squeezed: Tensor, mixing: Tensor | None) -> Tensor:
    """What a gate is a function of: one, and the squeezed map, which is of length 1 whatever its scale."""
    centred = squeezed - squeezed.mean(1, keepdim=True)
    length = centred.square().sum(1, keepdim=True).sqrt()
    unit = centred / torch.where(length > 0, length, 1.0)
    return torch.cat([torch.ones_like(unit[:, :1]), unit if mixing is None else unit @ mixing], 1)


def _first_order(sums: _Sums, samples: int) -> float:
    if samples < 2:
        return float(sums.products.norm())
    return math.sqrt(max(float(sums.products.square().sum()) - sums.own, 0.0) / (samples * (samples - 1)))


def _fisher(sums: _Sums, samples: int) -> float:
    return math.sqrt(sums.squares / samples)


#: Saliencies by name: from the sums of a site, and the number of samples, to its score. See `score`.
SALIENCIES: dict[str, Callable[[Any, int], float]] = {"first_order": _first_order, "fisher": _fisher}
