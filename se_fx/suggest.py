"""Suggestions: recommended options for a model, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from se_fx.criteria import AUTO, least_channels
from se_fx.errors import SqueezeExciteError
from se_fx.planning import Plan, percent
from se_fx.transform import plan

__all__ = ["Suggestion", "suggest"]

_HIDDEN = 64  # the least hidden width
_IN_UNITS = (
    "placement='residual': at the end of each residual branch, as in the paper. Blocks after every conv add more than twice as "
    "much time to training, and brought no more accuracy where that was measured, on Fashion-MNIST."
)
_KIND = (
    "block: none named, so Squeeze-and-Excitation. Of ECA, CBAM and effective SE none was shown to do better there, in five "
    "seeds each; block='eca' has next to no parameters, and added 9 % to a ResNet-50's latency where SE added 14 %."
)
_WHICH = (
    "Half of these blocks did as much as all of them there, on images unlike those the network was trained on: Plan.within "
    "keeps to a budget, and se_fx.score first, with by='score', says which ones your data wants."
)


@dataclass(frozen=True)
class Suggestion:
    """Recommended options: ``transform(model, **suggestion.options)``.

    Attributes:
        options: for `transform` and `plan`.
        reasons: why, a sentence or two each.
        plan: what these options choose.
    """

    options: dict[str, Any]
    reasons: tuple[str, ...]
    plan: Plan

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return "\n".join([f"se_fx.transform(model, {options})", *(f"- {reason}" for reason in self.reasons)])


def suggest(model: nn.Module, example_inputs: Any = None) -> Suggestion:
    """The options that MosaicML Composer's method card recommends, for this model; in residual units, if there are any.

    The card: hidden layers of at least 64 in every block; blocks from 512 output channels in ImageNet-scale models, and in
    smaller ones where the output channels are most. A block at the end of each residual branch is the paper's placement; blocks
    after each convolution add more than twice as much time to training, and brought no more accuracy where that was measured
    (`examples/evidence.py`), nor did other kinds of block.

    Args:
        model: as for `transform`. Left as it is.
        example_inputs: as for `plan`; with them, the reasons say what the blocks cost.

    Raises:
        SqueezeExciteError: as `plan` does.

    >>> print(suggest(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 256, 3))))  # doctest: +ELLIPSIS
    se_fx.transform(model, min_channels=256, latent_channels=64)
    - min_channels=256: 1 of 2 Conv2d layers. None has 512 output channels, ...
    """
    chosen = _chosen(model, example_inputs)
    in_units = chosen.sites[:1] and chosen.sites[0].placement == "residual"
    counts = [site.channels for site in chosen.sites] + [skip.channels for skip in chosen.skipped]
    least = least_channels("auto", counts)
    why = (
        "This is the recommendation for ImageNet-scale models: such layers see small feature maps, where blocks are cheapest"
        if least == AUTO
        else f"None has {AUTO} output channels, so this is the largest count there is, as recommended for smaller models"
    )
    reasons = [_IN_UNITS] if in_units else []
    reasons += [
        f"min_channels={least}: {len(chosen)} of {len(counts)} Conv2d layers. {why}.",
        f"latent_channels={_HIDDEN}: hidden layers of at least {_HIDDEN}, in every block. A fraction r does the same from "
        f"min_channels=int({_HIDDEN} / r) on.",
    ]
    gates = sum("attention" in skip.reason for skip in chosen.skipped)
    if gates:
        reasons.append(
            f"{gates} Conv2d layers compute attention gates: the model has attention already, so expect less of more."
        )
    if chosen.measured:
        shares = (
            f"{percent(getattr(chosen.added, name), getattr(chosen.base, name))} {name}"
            for name in ("params", "flops", "bytes")
        )
        reasons.append(
            f"It adds {', '.join(shares)} on these inputs. The card found about 20 % of inference latency: more than FLOPs "
            "tell, since a block reads and writes whole feature maps."
        )
    reasons += [_KIND, _WHICH] if in_units else []
    reasons.append("For a pretrained model, add init='identity': outputs stay as they are until training moves the gates.")
    where = {"placement": "residual"} if in_units else {}
    return Suggestion({**where, "min_channels": least, "latent_channels": _HIDDEN}, tuple(reasons), chosen)


def _chosen(model: nn.Module, example_inputs: Any) -> Plan:
    """In residual units, where there are some that are wide enough; else after convs."""
    options: dict[str, Any] = {"min_channels": "auto", "latent_channels": _HIDDEN}
    try:
        chosen = plan(model, example_inputs=example_inputs, placement="residual", **options)
    except SqueezeExciteError:  # no such place; whatever else is wrong is raised below
        chosen = Plan(())
    return chosen if len(chosen) else plan(model, example_inputs=example_inputs, **options)
