"""MosaicML Composer's real Trainer with our algorithm. `docs/composer.md` installs what these tests need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import se_fx
from se_fx import SqueezeExciteError

pytestmark = pytest.mark.composer
ARGUMENTS = (4, 32)


def classifier() -> Any:
    from composer.models import ComposerClassifier

    torch.manual_seed(0)
    return ComposerClassifier(timm.create_model("test_resnet", num_classes=10), num_classes=10)


def train(duration: str | None, *algorithms: Any, model: Any = None, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """A Trainer that has trained for `duration`, or not at all, and the hyperparameters it logged."""
    from composer import Trainer
    from composer.loggers import InMemoryLogger

    model, logger = model or classifier(), InMemoryLogger()
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) is matrix]} for matrix in (True, False)]
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(TensorDataset(images, torch.arange(16) % 10), 8),
        optimizers=torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        algorithms=algorithms,
        loggers=logger,
        max_duration=duration,
        device="cpu",
        seed=1,
        progress_bar=False,
        **settings,
    )
    if duration is not None:
        trainer.fit()
    trainer.close()
    return trainer, logger.hyperparameters


def squeeze_excite(*arguments: Any) -> Any:
    from se_fx.integrations.composer import SqueezeExcite

    return SqueezeExcite(*arguments)


def blocks(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "squeeze_excite" in name.split(".")}


def assert_equal_weights(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


def test_a_run_inserts_blocks_in_place_logs_them_and_trains_them() -> None:
    model = classifier()
    parameters = dict(model.named_parameters())
    trainer, logged = train("1ep", squeeze_excite(*ARGUMENTS), model=model)

    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels >= 32]
    assert trainer.state.model is model
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert logged["squeeze_excite/num_squeeze_excite_layers"] == len(convs) == len(blocks(model)) / 2
    (optimizer,) = trainer.state.optimizers
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    untrained = classifier()
    se_fx.apply_squeeze_excite(untrained, *ARGUMENTS, seed=1)  # drawn from the Trainer's seed, which all ranks share
    assert blocks(untrained).keys() == blocks(model).keys()
    assert all(not torch.equal(p, blocks(untrained)[name]) for name, p in blocks(model).items())


def test_blocks_are_drawn_from_the_trainers_seed_and_a_second_application_adds_nothing() -> None:
    from composer.core import Event

    model, untrained, algorithm = classifier(), classifier(), squeeze_excite(*ARGUMENTS)
    trainer, _ = train(None, algorithm, model=model)
    se_fx.apply_squeeze_excite(untrained, *ARGUMENTS, seed=1)
    assert_equal_weights(model, untrained)
    assert [event for event in Event if algorithm.match(event, trainer.state)] == [Event.INIT]
    algorithm.apply(Event.INIT, trainer.state, trainer.logger)
    assert_equal_weights(model, untrained)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = train("3ep", squeeze_excite(*ARGUMENTS))
    train("2ep", squeeze_excite(*ARGUMENTS), save_folder=str(tmp_path))
    path = str(tmp_path / "latest-rank0.pt")
    resumed, _ = train("3ep", squeeze_excite(*ARGUMENTS), load_path=path)
    assert_equal_weights(resumed.state.model, whole.state.model)
    assert [type(algorithm).__module__ for algorithm in resumed.state.algorithms] == ["se_fx.integrations.composer"]
    with pytest.raises(
        SqueezeExciteError, match=r"saved with SqueezeExcite\(latent_channels=4, min_channels=32\), and this run"
    ):
        train("3ep", squeeze_excite(4, 16), load_path=path)


def test_composers_own_methods_go_along() -> None:
    from composer.algorithms import BlurPool, ChannelsLast, LabelSmoothing

    trainer, logged = train(
        "1ep", BlurPool(replace_convs=False), squeeze_excite(*ARGUMENTS), ChannelsLast(), LabelSmoothing(0.1)
    )
    assert logged["squeeze_excite/num_squeeze_excite_layers"] > 0
    (optimizer,) = trainer.state.optimizers
    assert all(p in optimizer.state for name, p in trainer.state.model.named_parameters() if "squeeze_excite" in name)


def test_bad_arguments_and_no_effect() -> None:
    from composer.algorithms import BlurPool
    from composer.algorithms.warnings import NoEffectWarning

    with pytest.raises(SqueezeExciteError, match="latent_channels=0"):
        train("1ep", squeeze_excite(0))
    with pytest.raises(SqueezeExciteError, match=r"algorithms: BlurPool .* give it replace_convs=False"):
        train("1ep", BlurPool(), squeeze_excite(*ARGUMENTS))
    with pytest.warns(NoEffectWarning, match="no Conv2d has min_channels"):
        train(None, squeeze_excite(4, 10_000))
    assert repr(squeeze_excite(0.5, "auto")) == "SqueezeExcite(latent_channels=0.5, min_channels='auto')"
