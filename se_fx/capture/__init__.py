"""Capture: a module in, regions out that run exactly as it does.

A *region* is a module captured as graphs; what can't be traced runs its own code, and what that calls is captured region by
region, down to a lone Conv2d. Knows nothing of Squeeze-and-Excitation.
"""

from se_fx.capture.calls import Call
from se_fx.capture.capturing import Capture, Region, capture, collector_paused
from se_fx.capture.plain import check_plain, check_whole, is_conv
from se_fx.capture.randomness import check_seed, drawing_from, kept_on_failure, random_state, set_random_state
from se_fx.capture.snapshot import Snapshot
from se_fx.capture.tracer import EXCITED

__all__ = [
    "EXCITED",
    "Call",
    "Capture",
    "Region",
    "Snapshot",
    "capture",
    "check_plain",
    "check_seed",
    "check_whole",
    "collector_paused",
    "drawing_from",
    "is_conv",
    "kept_on_failure",
    "random_state",
    "set_random_state",
]
