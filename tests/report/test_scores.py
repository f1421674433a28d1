"""Scores in reports: a column and bars beside the costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

import se_fx


def test_the_page_shows_scores_beside_costs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3))
    x = torch.randn(1, 3, 16, 16)
    plain = se_fx.plan(model, min_channels=1, example_inputs=x)
    sites = tuple(dataclasses.replace(site, score=score) for site, score in zip(plain.sites, (0.25, 0.5), strict=True))
    page, without = tmp_path / "page.html", tmp_path / "without.html"
    for plan, file in ((dataclasses.replace(plain, sites=sites), page), (plain, without)):
        se_fx.report(se_fx.transform(model, plan), example_inputs=x).to_html(file)
    text = page.read_text("utf-8")
    assert "1: 0.5 score" in text
    assert ">Score<" in text
    assert "core" not in without.read_text("utf-8").replace("underscore", "")
