"""Regions: a module and graphs in, the same module out, running these; and copies of modules that share their tensors.

Knows nothing of how graphs are made, nor of Squeeze-and-Excitation.
"""

from se_fx.regions.cloning import clone
from se_fx.regions.running import (
    GraphRegion,
    Inserted,
    add_constants,
    constants_of,
    copied,
    graphs_of,
    hooked,
    own_class,
    reserve_names,
    restore_code,
    run_graphs,
    view,
)

__all__ = [
    "GraphRegion",
    "Inserted",
    "add_constants",
    "clone",
    "constants_of",
    "copied",
    "graphs_of",
    "hooked",
    "own_class",
    "reserve_names",
    "restore_code",
    "run_graphs",
    "view",
]
