"""The rewrites for training, in the order they are applied in.

In eager mode autograd keeps what Squeeze-and-Excitation needs for its gradients; nearly all of it can be computed again from
what the layers around it keep anyway. Values computed in the forward pass stay what they were, bit for bit; but for
`linear_gates` and `moments`. These save time: the last in compiled code alone.
"""

from collections.abc import Callable, Iterator

from se_fx.rewrites.change import Change
from se_fx.rewrites.training.keeping import Keeping
from se_fx.rewrites.training.matrices import linear_gates
from se_fx.rewrites.training.moments import moments
from se_fx.rewrites.training.recompute import recompute_activations, recompute_products, recompute_readers
from se_fx.rewrites.training.tails import Tail, tail_of
from se_fx.rewrites.training.weaving import is_training_call, relied_on

__all__ = ["ROUNDED", "TRAINING_REWRITES", "Keeping", "Tail", "TrainingRewrite", "is_training_call", "relied_on", "tail_of"]

#: Edits the graph, and tells what it did where.
TrainingRewrite = Callable[[Keeping], Iterator[Change]]

#: All rewrites for training by name, in the order they are applied in.
TRAINING_REWRITES: dict[str, TrainingRewrite] = {
    "linear_gates": linear_gates,
    "moments": moments,
    "recompute_activations": recompute_activations,
    "recompute_products": recompute_products,
    "recompute_readers": recompute_readers,
}

#: Those that change how results are rounded.
ROUNDED = frozenset({"linear_gates", "moments"})
