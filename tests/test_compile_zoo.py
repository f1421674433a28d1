"""`torch.compile(fullgraph=True)` works on a rewritten model wherever it works on the original. Slow: `-m zoo`."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchvision
import zoo
from test_zoo import TRAINED

import se_fx


@pytest.mark.zoo
@pytest.mark.parametrize("name", sorted(TRAINED.intersection(torchvision.models.list_models(module=torchvision.models))))
@torch.no_grad()
def test_fullgraph(name: str) -> None:
    """Dynamo and AOTAutograd make one graph of one model of each family: the others are the same code, longer."""
    warnings.simplefilter("ignore")
    *_, (build, args) = (attempt for attempt in zoo.torchvision_attempts(name) if attempt[1][0].shape[-1] <= 96)
    if name.startswith("maxvit"):  # made for one image size
        build, args = list(zoo.torchvision_attempts(name))[-1]
    model = zoo.with_noise(build).eval()
    args = tuple(arg[:1] for arg in args)
    rewritten = se_fx.transform(model, min_channels="auto", latent_channels=4)
    torch._dynamo.reset()
    try:
        actual = torch.compile(rewritten, fullgraph=True, backend="aot_eager")(*args)
    except Exception:
        torch._dynamo.reset()
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is, the original raises too
            torch.compile(model, fullgraph=True, backend="aot_eager")(*args)
        return
    expected = rewritten(*args)
    # The same kernels in another order of decomposition.
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
