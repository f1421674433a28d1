"""Regions: a module and graphs in, the same module out, running these; and copies of modules that share their tensors.

Knows nothing of how graphs are made, nor of Squeeze-and-Excitation.
"""

from se_fx.regions.classes import GraphRegion
from se_fx.regions.cloning import clone, exchange_tensors
from se_fx.regions.code import goes_through_children, may_return_none, set_by
from se_fx.regions.forwards import EXCITE, UNSCALED
from se_fx.regions.freshness import hooked, reached, watch
from se_fx.regions.running import (
    add_constants,
    constants_of,
    copied,
    excite,
    excitement,
    graphs_of,
    named,
    own_class,
    reserve_names,
    restore_code,
    run_graphs,
    run_host_graphs,
    run_own_code,
    view,
)
from se_fx.regions.sequences import Inserted

__all__ = [
    "EXCITE",
    "UNSCALED",
    "GraphRegion",
    "Inserted",
    "add_constants",
    "clone",
    "constants_of",
    "copied",
    "exchange_tensors",
    "excite",
    "excitement",
    "goes_through_children",
    "graphs_of",
    "hooked",
    "may_return_none",
    "named",
    "own_class",
    "reached",
    "reserve_names",
    "restore_code",
    "run_graphs",
    "run_host_graphs",
    "run_own_code",
    "set_by",
    "view",
    "watch",
]
