"""Measure: models and data in, figures out: timings, memory, what gates do, what becomes of outputs.

Timing knows nothing of blocks; what reads and folds trained gates does.
"""

from se_fx.measure.benchmark import bench
from se_fx.measure.bypass import blocks_of, bypassed
from se_fx.measure.changes import Changes
from se_fx.measure.folding import FoldedSite, Folding, KeptSite, fold_gates
from se_fx.measure.gates import GateProfile, SiteGates, profile_gates
from se_fx.measure.saliency import SALIENCIES, score
from se_fx.measure.timings import Benchmark, Row

__all__ = [
    "SALIENCIES",
    "Benchmark",
    "Changes",
    "FoldedSite",
    "Folding",
    "GateProfile",
    "KeptSite",
    "Row",
    "SiteGates",
    "bench",
    "blocks_of",
    "bypassed",
    "fold_gates",
    "profile_gates",
    "score",
]
