"""Lightning's real Trainer with our callback: in every order of calls, with modules of every kind, averages and compilers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
import torchvision
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning_modules import OPTIONS, Net, Small, assert_equal_weights, data, fitted, trainer
from test_copies import weights
from torch import Tensor, nn

import se_fx
from se_fx import SqueezeExciteError
from se_fx.integrations.lightning import SqueezeExcite

pytestmark = pytest.mark.integration


def test_fit_replaces_children_and_trains_their_blocks(tmp_path: Path) -> None:
    module, plain, logger = Net(), Net(), CSVLogger(tmp_path)
    training = trainer(tmp_path, SqueezeExcite(**OPTIONS, seed=3), logger=logger)
    training.fit(module, data(), data())

    convs = {name for name, m in plain.named_modules() if isinstance(m, nn.Conv2d) and m.out_channels >= 16}
    assert {site.name for site in module.squeeze_excite_plan.sites} == convs
    assert type(module) is Net
    new = {key for key in module.state_dict() if "squeeze_excite" in key.split(".")}
    assert set(plain.state_dict()) == set(module.state_dict()) - new
    assert len(weights(module)) == 2 * len(convs)
    held = {id(p) for group in training.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    fresh = Net()
    SqueezeExcite(**OPTIONS, seed=3).rewrite(fresh)
    assert all(not torch.equal(weights(fresh)[name], p) for name, p in weights(module).items())  # trained
    assert logger.experiment.hparams == {"lr": 0.01, "squeeze_excite/num_squeeze_excite_layers": len(convs)}


def test_a_module_rewritten_in_place_is_left_as_it_is(tmp_path: Path) -> None:
    module = Net()
    se_fx.apply_squeeze_excite(module, 4, 32)
    names = list(module.state_dict())
    trainer(tmp_path, SqueezeExcite(**OPTIONS)).fit(module, data())
    assert list(module.state_dict()) == names


def test_every_order_of_calls_on_fresh_trainers_inserts_once(tmp_path: Path) -> None:
    module, names = Small(), []
    calls = ["predict", "fit", "validate", "test", "fit", "predict"]
    for call in calls:
        callback = SqueezeExcite(**OPTIONS)
        getattr(trainer(tmp_path, callback), call)(module, data())
        names.append(list(module.state_dict()))
        assert callback.plan is module.squeeze_excite_plan
        assert len(weights(module)) == 2 * len(callback.plan)
    assert all(each == names[0] for each in names)

    path, expected = fitted(tmp_path, module), module.eval()(torch.ones(1, 3, 32, 32))
    other = Small()
    (first, *_) = trainer(tmp_path, SqueezeExcite(**OPTIONS)).predict(other, data(), ckpt_path=path)
    assert torch.equal(other.eval()(torch.ones(1, 3, 32, 32)), expected)
    assert torch.equal(first, module(next(iter(data()))[0]))


class Distance(torchmetrics.Metric):
    """A metric that holds a network, as those of perception do."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, 16, 1)

    def update(self, images: Tensor) -> None: ...

    def compute(self) -> None: ...


def test_children_of_every_kind() -> None:
    module = L.LightningModule()
    module.backbone = torchvision.models.resnet18()
    module.features = nn.Sequential(module.backbone.conv1, module.backbone.bn1, nn.ReLU(), module.backbone.layer1)
    module.alias = module.backbone
    module.heads = nn.ModuleList([nn.Conv2d(64, 512, 1), nn.Linear(2, 2)])
    module.other = L.LightningModule()
    module.other.net = nn.Conv2d(3, 512, 1)
    module.mine = se_fx.transform(nn.Sequential(nn.Conv2d(3, 512, 1)), min_channels=512)
    module.distance, module.nothing = Distance(), None
    module.linear = linear = nn.Linear(2, 2)
    parameters, x = dict(module.named_parameters()), torch.randn(2, 3, 64, 64)

    SqueezeExcite(min_channels=1, init="identity").rewrite(module)

    assert {name: p for name, p in module.named_parameters() if name in parameters} == parameters
    assert module.alias is module.backbone
    assert module.features[0] is module.backbone.conv1
    assert module.features[3] is module.backbone.layer1
    assert module.linear is linear
    assert not weights(module.distance)
    assert len(weights(module.mine)) == 2
    assert not any(site.name.startswith("mine") for site in module.squeeze_excite_plan.sites)
    assert len(module.squeeze_excite_plan.only("backbone.*")) == 20
    assert module.features(x).shape == (2, 64, 32, 32)
    assert module.backbone.eval()(x).shape == (2, 1000)


def test_a_module_whose_only_network_is_rewritten_already(tmp_path: Path) -> None:
    module = Small()
    module.model = rewritten = se_fx.transform(module.model, **OPTIONS)
    path = fitted(tmp_path, module)
    assert module.model is rewritten
    assert len(weights(module)) == 4
    SqueezeExcite.restore(module, torch.load(path))
    module.load_state_dict(torch.load(path)["state_dict"])


def test_a_placement_in_graphs_finds_the_norms_of_a_sequential_and_convs_need_none(tmp_path: Path) -> None:
    class Iterating(Small):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.model:
                x = layer(x)
            return x

    module = Iterating()
    trainer(tmp_path, SqueezeExcite(**OPTIONS)).fit(module, data())
    assert list(weights(module)) == [f"model.squeeze_excite.of_{i}.fc{j}.weight" for i in (0, 3) for j in (1, 2)]
    assert all(p.grad is not None for p in module.parameters())
    module = Small()
    SqueezeExcite(**OPTIONS, placement="norm").rewrite(module)
    assert list(weights(module)) == ["model.squeeze_excite.of_0.fc1.weight", "model.squeeze_excite.of_0.fc2.weight"]


def test_blocks_that_no_step_reaches_are_named(tmp_path: Path) -> None:
    class Past(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.model.forward_head(self.model.forward_features(self.stem(x)))

    with pytest.warns(
        UserWarning, match=r"parameters of .* blocks, 'model\.squeeze_excite\.conv1.* had no gradient in this epoch"
    ):
        trainer(tmp_path, SqueezeExcite(**OPTIONS)).fit(Past(), data())
    module = Past()
    se_fx.apply_squeeze_excite(module, 4, 16)  # what the warning says
    trainer(tmp_path).fit(module, data())
    assert all(p.grad is not None for p in module.parameters())


def test_models_built_by_hooks(tmp_path: Path) -> None:
    class Late(Small):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.built = None, 0

        def build(self) -> None:
            self.model = Small().model
            self.built += 1

        def configure_model(self) -> None:
            if self.model is None:
                self.build()

    module = Late()
    path = fitted(tmp_path, module)
    assert len(weights(module)) == 4
    assert module.built == 1
    fitted(tmp_path, module)
    again = Late()
    trainer(tmp_path, SqueezeExcite(**OPTIONS)).validate(again, data(), ckpt_path=path)
    assert len(weights(again)) == 4

    class InSetup(Late):
        configure_model = L.LightningModule.configure_model

        def setup(self, stage: str) -> None:
            self.build()

    with pytest.raises(
        SqueezeExciteError, match="InSetup holds no Conv2d; build its networks in __init__ or in configure_model"
    ):
        trainer(tmp_path, SqueezeExcite(**OPTIONS)).fit(InSetup(), data())


def test_averages_hold_the_blocks_where_they_copy_a_rewritten_module(tmp_path: Path) -> None:
    module, average = Small(), EMAWeightAveraging(decay=0.5)
    training = trainer(tmp_path, SqueezeExcite(**OPTIONS), average, StochasticWeightAveraging(0.01, 1), epochs=2)
    training.fit(module, data())
    assert set(weights(average._average_model.module)) == set(weights(module))
    assert_equal_weights(average._average_model.module, module)  # the average is copied back when training ends
    for other in (EMAWeightAveraging(), StochasticWeightAveraging(0.01, 1)):
        with pytest.raises(SqueezeExciteError, match=f"put SqueezeExcite before {type(other).__name__}"):
            trainer(tmp_path, other, SqueezeExcite(**OPTIONS)).fit(Small(), data())


def test_a_compiled_module_trains_alike(tmp_path: Path) -> None:
    torch.manual_seed(1)
    eager = Small()
    trainer(tmp_path, SqueezeExcite(**OPTIONS)).fit(eager, data())
    torch.manual_seed(1)
    compiled = Small()
    trainer(tmp_path, SqueezeExcite(**OPTIONS)).fit(torch.compile(compiled, backend="eager"), data())
    assert len(weights(compiled)) == 4
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())  # graphs may fuse the loss otherwise


def test_the_other_packages_trainer(tmp_path: Path) -> None:
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Small().model

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Other()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pytorch_lightning.Trainer(accelerator="cpu", callbacks=[SqueezeExcite(**OPTIONS)], max_epochs=1, **quiet).fit(
        module, data()
    )
    assert len(weights(module)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_channels": 17}, r"no Conv2d of Small qualifies for a block \(model.0: 16 output channels < min_channels=17\)"),
        ({"min_channels": 0}, "min_channels=0: "),
        ({"latent": 3}, "latent: there is no such option"),
        ({"where": "layer9.*"}, "where"),
        ({"placement": "residual", "min_channels": 1}, "placement='residual': the graphs of Small have no such place"),
        ({"plan": {"version": 1}}, "plan=dict: expected a Plan"),
    ],
)
def test_bad_options_change_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    module = Small()
    children = dict(module.named_children())
    with pytest.raises(SqueezeExciteError, match=message):
        trainer(tmp_path, SqueezeExcite(**options)).fit(module, data())
    assert dict(module.named_children()) == children
