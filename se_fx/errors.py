"""The one error class of se_fx."""

__all__ = ["SqueezeExciteError"]


class SqueezeExciteError(ValueError):
    """Something the caller can mend: the message names the argument or node, what was expected, and what to do."""
