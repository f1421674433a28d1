"""Analysis: a graph in, what its nodes compute out.

Which values come from the inputs, which are feature maps and of how many channels, what is a residual unit, what is attention,
what a neck. Graphs are read, or run on meta tensors; nothing is edited. Knows nothing of blocks, nor why it is asked.
"""

from se_fx.analysis.calls import Modules, arguments, called, is_plain, modules_of, on_meta, runs_pytorch
from se_fx.analysis.channels import Values, WithoutValues, channels, values_of
from se_fx.analysis.dataflow import ADDS, PRODUCTS, attention_convs, inserted, live
from se_fx.analysis.effects import Effects
from se_fx.analysis.flow import conv_flow
from se_fx.analysis.memo import remembering
from se_fx.analysis.necks import neck_convs
from se_fx.analysis.residual import Unit, activation_after, is_nonlinear, residual_units
from se_fx.analysis.statements import name_results

__all__ = [
    "ADDS",
    "PRODUCTS",
    "Effects",
    "Modules",
    "Unit",
    "Values",
    "WithoutValues",
    "activation_after",
    "arguments",
    "attention_convs",
    "called",
    "channels",
    "conv_flow",
    "inserted",
    "is_nonlinear",
    "is_plain",
    "live",
    "modules_of",
    "name_results",
    "neck_convs",
    "on_meta",
    "remembering",
    "residual_units",
    "runs_pytorch",
    "values_of",
]
