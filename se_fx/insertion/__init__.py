"""Insertion: a capture and blocks with their spots in, a rewritten model out; and back.

Knows nothing of plans and policies, nor of what a block does.
"""

from se_fx.insertion.assembly import Insertion, insert, insert_in_place, undone_on_failure
from se_fx.insertion.containers import CONTAINER, block_names, withdraw
from se_fx.insertion.optimizers import Joining, as_optimizers

__all__ = [
    "CONTAINER",
    "Insertion",
    "Joining",
    "as_optimizers",
    "block_names",
    "insert",
    "insert_in_place",
    "undone_on_failure",
    "withdraw",
]
