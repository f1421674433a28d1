"""Models on a GPU that isn't there: their tensors are fake, and an operator on tensors of two devices raises."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from test_afterwards import Network
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import se_fx
from se_fx.blocks import BLOCKS

OPTIONS: dict[str, Any] = {"min_channels": 1, "latent_channels": 4, "init": "identity"}


@contextlib.contextmanager
def on_gpu(
    make: Callable[[], nn.Module], *, within: bool, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[nn.Module, Tensor]]:
    """A model and an image on a GPU, fake; `within`: fake is also whatever is made inside."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.device("cuda"):
        torch.set_default_dtype(dtype)
        try:
            model, x = make(), torch.randn(2, 3, 64, 64)
        finally:
            torch.set_default_dtype(torch.float32)
    with mode if within else contextlib.nullcontext():
        yield model, x


def assert_on_gpu(value: Any, dtype: torch.dtype = torch.float32) -> None:
    assert isinstance(value, FakeTensor)
    assert (value.device.type, value.dtype) == ("cuda", dtype)


def assert_model_on_gpu(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    for parameter in model.parameters():
        assert isinstance(parameter, nn.Parameter)
        assert_on_gpu(parameter, dtype)
    assert all(buffer.device.type == "cuda" for buffer in model.buffers())


WITHIN = pytest.mark.parametrize("within", [False, True])


@WITHIN
@pytest.mark.parametrize("placement", ["conv", "residual", "pre"])
def test_everything_runs_there(placement: str, within: bool) -> None:
    added = se_fx.plan(Network(), placement=placement, example_inputs=torch.empty(2, 3, 64, 64), **OPTIONS).added
    with on_gpu(Network, within=within) as (model, x):
        costs = se_fx.plan(model, placement=placement, example_inputs=x, **OPTIONS)
        assert costs.added == added
        gm = se_fx.transform(model, placement=placement, seed=0, **OPTIONS)
        assert_model_on_gpu(gm)
        assert_on_gpu(gm(x))
        assert se_fx.report(gm, example_inputs=x).added == costs.added
        assert_on_gpu(se_fx.optimize_for_training(gm, example_inputs=x)(x))
        assert_on_gpu(se_fx.optimize_for_inference(gm.eval(), example_inputs=x)(x))
        assert_on_gpu(se_fx.remove(gm)(x))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        se_fx.apply_squeeze_excite(model, 4, 1, optimizer, placement=placement, init="identity")
        assert_model_on_gpu(model)
        assert_on_gpu(model(x))


@WITHIN
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_by_name_are_made_there(block: str, within: bool) -> None:
    with on_gpu(Network, within=within, dtype=torch.bfloat16) as (model, x):
        gm = se_fx.transform(model.eval(), block=block, min_channels=1, init="identity")
        assert_model_on_gpu(gm, torch.bfloat16)
        if within:  # else PyTorch's batch norm asks the driver about this type
            assert_on_gpu(gm(x), torch.bfloat16)


@WITHIN
def test_a_network_of_others(within: bool) -> None:
    with on_gpu(lambda: torchvision.models.resnet18(weights=None), within=within) as (model, x):
        gm = se_fx.transform(model.eval(), placement="residual", **OPTIONS)
        assert_on_gpu(gm(x))
        assert_on_gpu(se_fx.optimize_for_inference(gm, example_inputs=x)(x))


def test_a_failure_there_is_the_users_own() -> None:
    with on_gpu(Network, within=False) as (model, _):
        state = torch.get_rng_state()
        with pytest.raises(se_fx.SqueezeExciteError, match="on purpose"):
            se_fx.transform(model, min_channels=1, block=_fails)
        assert torch.equal(torch.get_rng_state(), state)


def _fails(channels: int) -> nn.Module:
    raise RuntimeError("on purpose")
