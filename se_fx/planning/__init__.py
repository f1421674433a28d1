"""Planning: a capture and options in, a plan out, and where each of its sites is in the capture.

A plan is plain data. Knows nothing of how blocks are inserted, nor how reports show what was.
"""

from se_fx.planning.choosing import check_alone, choose, fit
from se_fx.planning.excerpt import Part, excerpt_of
from se_fx.planning.options import BlockFactory, Function, Options, Overrides
from se_fx.planning.plan import Plan, costed, give_plan, plan_of, take_plans
from se_fx.planning.site import Site, Skip
from se_fx.planning.tables import percent, site_table

__all__ = [
    "BlockFactory",
    "Function",
    "Options",
    "Overrides",
    "Part",
    "Plan",
    "Site",
    "Skip",
    "check_alone",
    "choose",
    "costed",
    "excerpt_of",
    "fit",
    "give_plan",
    "percent",
    "plan_of",
    "site_table",
    "take_plans",
]
