"""Squeeze-and-Excitation as a torch.fx compiler pass."""

from se_fx.blocks import SqueezeExcite2d
from se_fx.cost import Cost, Machine, measure_machine
from se_fx.errors import SqueezeExciteError
from se_fx.measure import (
    Benchmark,
    Folding,
    GateProfile,
    SiteGates,
    bench,
    blocks_of,
    bypassed,
    fold_gates,
    profile_gates,
    score,
)
from se_fx.optimize import optimize_for_inference, optimize_for_training
from se_fx.planning import Plan, Site
from se_fx.report import Report
from se_fx.rewrites import Optimization
from se_fx.sharing import load_blocks, save_blocks
from se_fx.suggest import Suggestion, suggest
from se_fx.transform import apply_squeeze_excite, plan, remove, report, transform

__all__ = [
    "Benchmark",
    "Cost",
    "Folding",
    "GateProfile",
    "Machine",
    "Optimization",
    "Plan",
    "Report",
    "Site",
    "SiteGates",
    "SqueezeExcite2d",
    "SqueezeExciteError",
    "Suggestion",
    "apply_squeeze_excite",
    "bench",
    "blocks_of",
    "bypassed",
    "fold_gates",
    "load_blocks",
    "measure_machine",
    "optimize_for_inference",
    "optimize_for_training",
    "plan",
    "profile_gates",
    "remove",
    "report",
    "save_blocks",
    "score",
    "suggest",
    "transform",
]
__version__ = "0.1.0"
