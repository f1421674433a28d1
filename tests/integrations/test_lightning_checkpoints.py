"""Checkpoints of Lightning's Trainer: resumed, restored without one, and refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_modules import OPTIONS, Small, assert_equal_weights, data, fitted, trainer
from test_copies import weights
from torch import Tensor, nn

from se_fx import SqueezeExciteError
from se_fx.integrations.lightning import SqueezeExcite

pytestmark = pytest.mark.integration


def test_resuming_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = Small()
    fitted(tmp_path / "whole", whole, epochs=2)
    torch.manual_seed(1)
    path = fitted(tmp_path / "half", Small(), epochs=1)
    resumed = Small()
    trainer(tmp_path, SqueezeExcite(**OPTIONS), epochs=2).fit(resumed, data(), ckpt_path=path)
    assert_equal_weights(resumed, whole)


class NormedGate(nn.Module):
    """Attention that has buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.norm(x).sigmoid()


def test_blocks_with_buffers_resume(tmp_path: Path) -> None:
    options = {"latent_channels": 64, "block": NormedGate}  # 64 is the default
    module = Small()
    path = fitted(tmp_path, module, **options)
    assert any("running_mean" in name for name in weights(module))
    resumed = Small()
    trainer(tmp_path, SqueezeExcite(**{**OPTIONS, **options})).fit(resumed, data(), ckpt_path=path)
    assert_equal_weights(resumed, module)


class Restoring(Small):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        SqueezeExcite.restore(self, checkpoint)


def test_inference_without_a_trainer(tmp_path: Path) -> None:
    module = Restoring(lr=0.5)
    path = fitted(tmp_path, module, placement="norm", overrides={"model.0": {"latent_channels": 8}})

    loaded = Restoring.load_from_checkpoint(path)
    assert loaded.hparams.lr == 0.5
    checkpoint = torch.load(path, weights_only=True)
    by_hand = Small(**checkpoint["hyper_parameters"])
    SqueezeExcite.restore(by_hand, checkpoint)
    by_hand.load_state_dict(checkpoint["state_dict"])
    for other in (loaded, by_hand, copy.deepcopy(by_hand), pickle.loads(pickle.dumps(loaded))):
        assert_equal_weights(other, module)
        assert torch.equal(other.eval()(torch.ones(2, 3, 32, 32)), module.eval()(torch.ones(2, 3, 32, 32)))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Small.load_from_checkpoint(path)


def test_a_checkpoint_of_the_plain_module_loads_as_the_module_wants(tmp_path: Path) -> None:
    plain = Restoring()
    training = trainer(tmp_path)
    training.fit(plain, data())
    training.save_checkpoint(tmp_path / "plain.ckpt")
    assert_equal_weights(Restoring.load_from_checkpoint(tmp_path / "plain.ckpt"), plain)  # nothing to restore

    module = Small()
    with pytest.raises(RuntimeError, match="Missing key"):
        trainer(tmp_path, SqueezeExcite(**OPTIONS)).validate(module, data(), ckpt_path=tmp_path / "plain.ckpt")
    module.strict_loading = False
    trainer(tmp_path, SqueezeExcite(**OPTIONS)).validate(module, data(), ckpt_path=tmp_path / "plain.ckpt")
    assert torch.equal(module.model[0].weight, plain.model[0].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"latent_channels": 8},
            r"state_dict: its .* blocks are not .*; model.0.* has \(4, 16\) there, and \(8, 16\) in the module",
        ),
        (
            {"where": "model.3"},
            r"state_dict: .*model.squeeze_excite.of_0.fc1.weight has \(4, 16\) there, and none in the module",
        ),
        (
            {"gate": "hardsigmoid"},
            r"gate: the checkpoint is of a block with gate='sigmoid', and this one has gate='hardsigmoid'",
        ),
    ],
)
def test_resuming_with_other_options_raises(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = fitted(tmp_path, Small())
    with pytest.raises(SqueezeExciteError, match=message):
        trainer(tmp_path, SqueezeExcite(**{**OPTIONS, **options})).fit(Small(), data(), ckpt_path=path)
    other = Small()
    SqueezeExcite(**{**OPTIONS, **options}).rewrite(other)
    with pytest.raises(SqueezeExciteError, match="saved with other blocks"):
        SqueezeExcite.restore(other, torch.load(path))


@pytest.mark.parametrize("checkpoint", [3, None, {"callbacks": 3}, {"callbacks": {"SqueezeExcite": {"plan": 3}}}])
def test_checkpoints_that_are_none(checkpoint: Any) -> None:
    plain, rewritten = Small(), Small()
    SqueezeExcite(**OPTIONS).rewrite(rewritten)
    for module in (plain, rewritten):
        keys = list(module.state_dict())
        with pytest.raises(SqueezeExciteError, match=r"checkpoint|plan"):
            SqueezeExcite.restore(module, checkpoint)
        assert list(module.state_dict()) == keys
