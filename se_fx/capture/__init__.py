"""Capture: a module in, regions out that run exactly as it does.

A *region* is a module captured as graphs; what can't be traced runs its own code, and what that calls is captured region by
region, down to a lone Conv2d. Beside that, what a captured module can be turned into: a module that runs other graphs, and
copies that share their tensors. Knows nothing of Squeeze-and-Excitation.
"""

from se_fx.capture.capturing import Capture, Region, capture, collector_paused, is_foreign
from se_fx.capture.cloning import clone
from se_fx.capture.plain import check_whole
from se_fx.capture.randomness import check_seed, drawing_from, kept_on_failure, random_state, set_random_state
from se_fx.capture.regions import (
    GraphRegion,
    Inserted,
    add_constants,
    constants_of,
    copied,
    graphs_of,
    hooked,
    own_class,
    restore_code,
    run_graphs,
    view,
)
from se_fx.capture.tracer import TRACED_HOOKS, Tracer, has_traced_hooks

__all__ = [
    "TRACED_HOOKS",
    "Capture",
    "GraphRegion",
    "Inserted",
    "Region",
    "Tracer",
    "add_constants",
    "capture",
    "check_seed",
    "check_whole",
    "clone",
    "collector_paused",
    "constants_of",
    "copied",
    "drawing_from",
    "graphs_of",
    "has_traced_hooks",
    "hooked",
    "is_foreign",
    "kept_on_failure",
    "own_class",
    "random_state",
    "restore_code",
    "run_graphs",
    "set_random_state",
    "view",
]
