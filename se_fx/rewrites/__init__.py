"""Rewrites: a graph in, a graph that computes the same for less out.

`algebra` says what nodes compute, `editing` changes them; the rewrites stand in packages by what they are for, one a module.
Knows nothing of capture's ways, nor how models are put together again.
"""

from se_fx.rewrites.algebra import Algebra
from se_fx.rewrites.change import Change, Rewrite
from se_fx.rewrites.inference import REWRITES
from se_fx.rewrites.optimization import Optimization, Step, give_optimization, optimization_of

__all__ = ["REWRITES", "Algebra", "Change", "Optimization", "Rewrite", "Step", "give_optimization", "optimization_of"]
