"""Report: sites and costs in, text, JSON and a page out. Knows nothing of graphs, nor of how costs are computed."""

from se_fx.report.report import Estimate, Report

__all__ = ["Estimate", "Report"]
