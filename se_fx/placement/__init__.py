"""Placement: a graph in, the spots where blocks can go out. Knows nothing of blocks, nor of how nodes are edited.

A policy is a function ``(graph, root) -> Iterable[Spot]``, `root` being the module the graph's targets refer to, not to be
changed. Any function of this kind does; `PLACEMENTS` names those that come along.

    unit:      start ──┬── conv ─ norm ─ relu ─ conv ─ norm ──── add ─ relu ──
                       └──────────── shortcut ──────────────────┘
    pre ───────────────▲           ▲                  ▲  ▲        ▲     ▲
    activation ────────────────────┘ (every conv)     │  │        │     │
    conv, norm ─────────────────────(every conv)──────┘──┤        │     │
    residual ────────────────────────────────────────────┘        │     │
    identity (on the shortcut) ───────────────────────────────────┘     │
    post ───────────────────────────────────────────────────────────────┘
"""

from se_fx.placement.convs import activation, conv, norm
from se_fx.placement.spot import Policy, Spot
from se_fx.placement.units import identity, post, pre, residual

__all__ = ["ELSEWHERE", "PLACEMENTS", "Policy", "Spot", "activation", "conv", "identity", "norm", "post", "pre", "residual"]

#: Placement policies by name.
PLACEMENTS: dict[str, Policy] = {
    "conv": conv,
    "norm": norm,
    "activation": activation,
    "residual": residual,
    "pre": pre,
    "post": post,
    "identity": identity,
}
#: Why a Conv2d is not where a policy puts blocks.
ELSEWHERE = {
    "conv": "is never called by the code that was captured",
    "norm": "is followed by no normalisation",
    "activation": "is followed by no activation",
    **dict.fromkeys(("residual", "pre", "post", "identity"), "is not the last Conv2d of a residual branch"),
}
