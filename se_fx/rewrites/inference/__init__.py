"""The rewrites for inference, one a module, in the order they are applied in.

Blends come first, since they leave gates; constant gates next, since they leave factors that fold as norms do; then norms, so
that hoisting composes one matrix and not two; products when no matrix will change any more; scales last.
"""

from se_fx.rewrites.change import Rewrite
from se_fx.rewrites.inference.blends import blends
from se_fx.rewrites.inference.constant_gates import constant_gates
from se_fx.rewrites.inference.fold_norms import fold_norms
from se_fx.rewrites.inference.fuse_scales import fuse_scales
from se_fx.rewrites.inference.hoist_squeezes import hoist_squeezes
from se_fx.rewrites.inference.vector_products import vector_products

__all__ = ["REWRITES"]

#: All rewrites by name, in the order they are applied in.
REWRITES: dict[str, Rewrite] = {
    "blends": blends,
    "constant_gates": constant_gates,
    "fold_norms": fold_norms,
    "hoist_squeezes": hoist_squeezes,
    "vector_products": vector_products,
    "fuse_scales": fuse_scales,
}
