"""Rewrites: a graph in, a graph that computes the same for less out.

`algebra` says what nodes compute, `editing` changes them; the rewrites stand in packages by what they are for, one a module.
Knows nothing of capture's ways, nor how models are put together again.
"""

from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.change import Change, Rewrite
from se_fx.rewrites.inference import REWRITES
from se_fx.rewrites.optimization import Optimization, Step, give_optimization, optimization_of
from se_fx.rewrites.training import (
    ROUNDED,
    TRAINING_REWRITES,
    Keeping,
    Tail,
    TrainingRewrite,
    is_training_call,
    relied_on,
    tail_of,
)

__all__ = [
    "REWRITES",
    "ROUNDED",
    "TRAINING_REWRITES",
    "Algebra",
    "Change",
    "Keeping",
    "Optimization",
    "Rewrite",
    "Step",
    "Tail",
    "TrainingRewrite",
    "give_optimization",
    "is_training_call",
    "optimization_of",
    "relied_on",
    "tail_of",
]
