"""Analysis: a graph in, what its nodes compute out.

Which values come from the inputs, which are feature maps and of how many channels, what is a residual unit, what is attention.
Graphs are read, or run on meta tensors; nothing is edited. Knows nothing of blocks, nor why it is asked.
"""

from se_fx.analysis.channels import channels, maps_and_vectors
from se_fx.analysis.dataflow import (
    ADDS,
    PRODUCTS,
    Modules,
    attention_convs,
    called,
    changes_in_place,
    describes,
    modules_of,
    pools_globally,
)
from se_fx.analysis.residual import Unit, activation_after, residual_units

__all__ = [
    "ADDS",
    "PRODUCTS",
    "Modules",
    "Unit",
    "activation_after",
    "attention_convs",
    "called",
    "changes_in_place",
    "channels",
    "describes",
    "maps_and_vectors",
    "modules_of",
    "pools_globally",
    "residual_units",
]
