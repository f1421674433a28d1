"""Gates: what the blocks of a trained model do on data, site by site."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from se_fx.arguments import as_path
from se_fx.blocks import SqueezeExcite2d
from se_fx.cost import as_batches, as_call, calling
from se_fx.errors import SqueezeExciteError
from se_fx.insertion import block_names
from se_fx.measure.progress import progress_bar
from se_fx.planning import Plan

__all__ = ["GateProfile", "SiteGates", "profile_gates"]


@dataclass(frozen=True)
class SiteGates:
    """One site's gates over some data. A shared module's gates count once for each of its calls.

    Attributes:
        name: the site's name.
        samples: how many samples the gates were computed for.
        channel_means: mean gate of each channel over the samples, (C,), float64, on the CPU.
        channel_spreads: standard deviation of each channel's gate over the samples, (C,): 0 where the gate is constant.
        class_means: mean gate of each channel over each class's samples, (C,), by label; empty without labels.
    """

    name: str
    samples: int
    channel_means: Tensor
    channel_spreads: Tensor
    class_means: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean gate over samples and channels."""
        return float(self.channel_means.mean())

    @property
    def spread_over_samples(self) -> float:
        """How much gates depend on the sample, as the mean over channels of `channel_spreads`."""
        return float(self.channel_spreads.mean())

    @property
    def spread_over_channels(self) -> float:
        """How much channels differ, as the standard deviation of `channel_means`."""
        return float(self.channel_means.std(correction=0))

    @property
    def spread_over_classes(self) -> float | None:
        """How much gates depend on the class, as the mean over channels of the class means' spread; None without labels."""
        if not self.class_means:
            return None
        return float(torch.stack(list(self.class_means.values())).std(0, correction=0).mean())


@dataclass(frozen=True)
class GateProfile:
    """The gates of a model's sites over some data. `print` it, `plot` it, or read its parts.

    Attributes:
        sites: those with blocks of se_fx's own, in the order of the model; sites that were never reached have 0 samples.
    """

    sites: tuple[SiteGates, ...]

    def __str__(self) -> str:
        headers = ["conv", "samples", "mean gate", "spread over samples", "over channels"]
        labelled = any(site.class_means for site in self.sites)
        rows = []
        for site in self.sites:
            cells = [site.mean, site.spread_over_samples, site.spread_over_channels]
            cells += [site.spread_over_classes or 0.0] if labelled else []
            rows.append([site.name, f"{site.samples:,}", *(f"{cell:.4f}" if site.samples else "-" for cell in cells)])
        headers += ["over classes"] if labelled else []
        align = ["left", *["right"] * (len(headers) - 1)]
        return tabulate(rows, headers, disable_numparse=True, colalign=align)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "sites": [
                {
                    "name": site.name,
                    "samples": site.samples,
                    "channel_means": site.channel_means.tolist(),
                    "channel_spreads": site.channel_spreads.tolist(),
                    "class_means": {str(label): means.tolist() for label, means in site.class_means.items()},
                }
                for site in self.sites
            ]
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw each site's mean gates, channels sorted by them, and each class's where there are labels: the paper's figure 6.

        Args:
            path: an image file; its ending says of what kind, such as ".png" or ".svg".

        Raises:
            SqueezeExciteError: `path` is none of a kind of image, matplotlib isn't installed, or there is nothing to draw.
        """
        file = as_path("path", path)
        sites = [site for site in self.sites if site.samples]
        if not sites:
            raise SqueezeExciteError("plot: no site of this profile was reached by any sample; profile batches that reach them")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise SqueezeExciteError("plot: matplotlib draws it; pip install 'se_fx[html]'") from error
        columns = min(4, len(sites))
        lines = -(-len(sites) // columns)
        figure = Figure(figsize=(3.6 * columns, 2.5 * lines), layout="constrained")
        for axes, site in zip(figure.subplots(lines, columns, squeeze=False).flat, sites, strict=False):
            order = site.channel_means.argsort()
            for label, means in site.class_means.items():
                axes.plot(means[order], linewidth=0.8, label=f"class {label}")
            axes.plot(site.channel_means[order], linewidth=1.2, color="black", label="all")
            axes.set_title(site.name, fontsize=9)
            axes.set_ylim(bottom=0)
            axes.tick_params(labelsize=7)
        for axes in figure.axes[len(sites) :]:
            axes.set_axis_off()
        figure.axes[0].legend(fontsize=7, ncols=2)
        figure.supxlabel("channels, in the order of their mean gate", fontsize=9)
        figure.supylabel("mean gate", fontsize=9)
        kinds = figure.canvas.get_supported_filetypes()
        if file.suffix[1:].lower() not in kinds:
            raise SqueezeExciteError(f"path={str(file)!r}: expected an ending that says which image: {', '.join(kinds)}")
        figure.savefig(file, dpi=150)


def profile_gates(rewritten: nn.Module, batches: Iterable[Any], *, progress: bool = True) -> GateProfile:
    """Run data through a rewritten model, in eval mode, and gather what its gates are. The model is left as it is.

    Args:
        rewritten: what `transform` or `apply_squeeze_excite` made of a model, trained.
        batches: what to call it with, each a tensor, a tuple of positional or a dict of keyword arguments; or a pair of
            these and labels, a tensor of integers, one for each sample (as data loaders yield it).
        progress: show a progress bar on stderr, if tqdm is installed.

    Raises:
        SqueezeExciteError: the model isn't a rewritten one or has no block of se_fx's own, it can't be called with a batch, or
            there is none.

    >>> import se_fx
    >>> net = se_fx.transform(nn.Sequential(nn.Conv2d(3, 8, 3)), min_channels=1, init="identity")
    >>> print(profile_gates(net, [torch.randn(4, 3, 8, 8)], progress=False))
    conv      samples    mean gate    spread over samples    over channels
    ------  ---------  -----------  ---------------------  ---------------
    0               4       1.0000                 0.0000           0.0000
    """
    plan, blocks = Plan.of(rewritten), block_names(rewritten)
    own = {name: rewritten.get_submodule(path) for name, path in blocks.items()}
    sums = {site.name: _Sums(site.channels) for site in plan.sites if isinstance(own[site.name], SqueezeExcite2d)}
    if not sums:
        raise SqueezeExciteError(
            "rewritten: it has no block of se_fx's own, and gates of others can't be told; transform without block="
        )
    given = as_batches(batches, "batches")
    total, count = len(given) if isinstance(given, Sized) else None, 0
    with _evaluating(rewritten), progress_bar("gates", "batch", total, progress) as tick:
        for batch in given:
            inputs, labels = labelled(batch)
            args, kwargs = call = as_call(inputs, "batches: batch")
            with calling("batches", call), _watched({name: own[name] for name in sums}, sums, labels):
                rewritten(*args, **kwargs)
            count += 1
            tick()
    if not count:
        raise SqueezeExciteError("batches: expected at least one batch, and there was none")
    return GateProfile(tuple(each.statistics(name) for name, each in sums.items()))


class _Sums:
    """Sums from which means and spreads follow, in float64."""

    def __init__(self, channels: int) -> None:
        self.samples = 0
        self.first, self.second = torch.zeros(2, channels, dtype=torch.float64)
        self.by_class: dict[int, tuple[int, Tensor]] = {}

    def add(self, gates: Tensor, labels: Tensor | None) -> None:
        """Take in gates (N, C)."""
        gates = gates.double().cpu()
        self.samples += len(gates)
        self.first = self.first + gates.sum(0)
        self.second = self.second + gates.square().sum(0)
        for label in [] if labels is None else labels.unique().tolist():  # type: ignore[no-untyped-call]
            chosen = gates[labels == label]
            count, known = self.by_class.get(label, (0, torch.zeros_like(self.first)))
            self.by_class[label] = count + len(chosen), known + chosen.sum(0)

    def statistics(self, name: str) -> SiteGates:
        """What they say."""
        samples = max(self.samples, 1)
        means = self.first / samples
        variances = (self.second / samples - means.square()).clamp_(min=0)
        by_class = {label: total / count for label, (count, total) in sorted(self.by_class.items())}
        return SiteGates(name, self.samples, means, variances.sqrt(), by_class)


def labelled(batch: Any) -> tuple[Any, Tensor | None]:
    """A batch's inputs, and its labels, if it is a pair of the two."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        labels = batch[1]
        if labels.ndim == 1 and not labels.is_floating_point() and not labels.is_complex():
            return batch[0], labels.cpu()
    return batch, None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within, `model` is in eval mode, without gradients."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _watched(blocks: Mapping[str, nn.Module], sums: Mapping[str, _Sums], labels: Tensor | None) -> Iterator[None]:
    """Within, `sums` take in the gates of `blocks`."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(block: nn.Module, args: tuple[Tensor]) -> None:
            assert isinstance(block, SqueezeExcite2d)
            gates = block.excitation(args[0]).flatten(-3)
            gates = gates if gates.ndim == 2 else gates[None]  # unbatched
            fits = labels if labels is not None and len(labels) == len(gates) else None
            if labels is not None and fits is None:
                raise SqueezeExciteError(
                    f"batches: {len(labels)} labels came with gates of {len(gates)} samples at {name!r}; expected as many"
                )
            sums[name].add(gates, fits)

        return add

    handles = [block.register_forward_pre_hook(watch(name)) for name, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
