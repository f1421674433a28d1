"""Optimising: a model in, a copy in which Squeeze-and-Excitation costs little out, for inference or for training.

Models are captured more finely than for insertion, their graphs rewritten, and put together again. Knows nothing of how
rewrites work.
"""

from se_fx.optimize.backend import inductor_behind_rewrites
from se_fx.optimize.inference import optimize_for_inference
from se_fx.optimize.training import optimize_for_training

__all__ = ["inductor_behind_rewrites", "optimize_for_inference", "optimize_for_training"]
