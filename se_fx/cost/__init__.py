"""Cost: a module and example inputs in, what a call of it takes out: MACs, FLOPs, bytes moved, bytes kept for backward.

Counted on fake tensors, operator by operator; `RULES` has what each takes. Knows nothing of blocks, plans and tables.
"""

from se_fx.cost.activations import activation_bytes
from se_fx.cost.counting import NEEDS_VALUES, NO_COST, Cost, Measurement, Operator, measure
from se_fx.cost.fakes import Call, as_batches, as_call, calling, describe_call, fake_on, faked
from se_fx.cost.roofline import Machine, measure_machine
from se_fx.cost.rules import RULES

__all__ = [
    "NEEDS_VALUES",
    "NO_COST",
    "RULES",
    "Call",
    "Cost",
    "Machine",
    "Measurement",
    "Operator",
    "activation_bytes",
    "as_batches",
    "as_call",
    "calling",
    "describe_call",
    "fake_on",
    "faked",
    "measure",
    "measure_machine",
]
