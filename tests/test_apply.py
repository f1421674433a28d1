"""`apply_squeeze_excite`: in place, in the middle of training, with any optimizers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import se_fx


class Net(nn.Module):
    """A network in a class of its own, with all that surgery tends to break."""

    def __init__(self, features: nn.Module | None = None) -> None:
        super().__init__()
        self.features = features or torchvision.models.resnet18()
        self.normed = parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1))
        self.tied = nn.Conv2d(3, 3, 3, padding=1)
        self.twin = nn.Conv2d(3, 3, 3, padding=1)
        self.twin.weight = self.tied.weight
        self.head = nn.Linear(1000, 10)
        self.calls = 0

    def embed(self, x: Tensor) -> Tensor:
        return self.features(self.twin(self.tied(self.normed(x))))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.embed(x))

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(-1)


def step(model: nn.Module, optimizers: list[torch.optim.Optimizer], x: Tensor) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    model(x).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


X = torch.randn(2, 3, 64, 64)


def test_in_the_middle_of_training_a_pretrained_network(lite0: nn.Module) -> None:
    net = Net(copy.deepcopy(lite0)).train()
    hooked: list[str] = []
    net.features._blocks[3].register_forward_hook(lambda *_: hooked.append("block"))
    decayed = [p for n, p in net.named_parameters() if n.startswith("features")]
    others = [p for n, p in net.named_parameters() if not n.startswith("features")]
    groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": others, "lr": 1e-3}]
    optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
    step(net, [optimizer], X)
    parameters = dict(net.named_parameters())
    modules = dict(net.named_modules())
    momentum = {p: optimizer.state[p]["momentum_buffer"].clone() for p in parameters.values()}
    sizes = [len(group["params"]) for group in optimizer.param_groups]

    assert se_fx.apply_squeeze_excite(net, latent_channels=4, min_channels=3, optimizers=optimizer) is None

    assert isinstance(net, Net)
    assert all(net.get_submodule(name) is module for name, module in modules.items())
    assert all(dict(net.named_parameters())[name] is p for name, p in parameters.items())
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], buffer) for p, buffer in momentum.items())
    new = {name: p for name, p in net.named_parameters() if name not in parameters}
    assert len(new) == 2 * (49 + 3)  # EfficientNet-Lite0 has 49 convs
    assert all("squeeze_excite" in name.split(".") for name in new)
    for name, parameter in new.items():
        (home,) = [i for i, group in enumerate(optimizer.param_groups) if any(p is parameter for p in group["params"])]
        assert home == (0 if name.startswith("features") else 1)
    assert [len(group["params"]) - size for group, size in zip(optimizer.param_groups, sizes, strict=True)] == [98, 6]

    before = {name: p.clone() for name, p in new.items()}
    for _ in range(2):
        step(net, [optimizer], X)
    assert all(not torch.equal(p, before[name]) for name, p in new.items())
    assert net.calls == 3
    assert hooked == ["block"] * 3
    assert net.predict(X).shape == (2,)
    restored = torch.optim.SGD([{"params": g["params"]} for g in optimizer.param_groups], lr=1.0, momentum=0.9)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [g["lr"] for g in restored.param_groups] == [1e-2, 1e-3]


def test_every_way_to_a_conv_goes_through_its_block() -> None:
    net = Net().eval()
    se_fx.apply_squeeze_excite(net, latent_channels=4, min_channels=3)
    reached: list[str] = []
    for name, module in net.named_modules():
        if isinstance(module, se_fx.SqueezeExcite2d):
            module.register_forward_hook(lambda *_, name=name: reached.append(name))
    net.embed(X)
    assert len(reached) == 23
    reached.clear()
    net.features.layer1[0].conv1(torch.randn(1, 64, 8, 8))
    assert reached == ["features.layer1.0.squeeze_excite.of_conv1"]


def test_is_composers_result() -> None:
    model = torchvision.models.resnet50()
    before = sum(p.numel() for p in model.parameters())
    se_fx.apply_squeeze_excite(model, latent_channels=64, min_channels=512)
    added = sum(p.numel() for p in model.parameters()) - before
    assert added == sum(2 * 64 * m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels >= 512)


def test_a_second_call_adds_nothing_and_remove_undoes() -> None:
    net = Net().eval()
    expected, keys = net(X), list(net.state_dict())
    for _ in range(2):
        se_fx.apply_squeeze_excite(net, min_channels=3)
    assert sum(isinstance(m, se_fx.SqueezeExcite2d) for m in net.modules()) == 23
    original = se_fx.remove(net)
    assert list(original.state_dict()) == keys
    assert torch.equal(original(X), expected)
    assert type(original) is Net
    assert not torch.equal(net(X), expected)


def test_copies_pickles_and_compiles() -> None:
    model = torchvision.models.resnet18().eval()
    se_fx.apply_squeeze_excite(model, min_channels=256)
    expected = model(X)
    assert torch.equal(copy.deepcopy(model)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), expected)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(X), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
        lambda ps: torch.optim.Adam(ps, amsgrad=True),
        lambda ps: torch.optim.AdamW(ps),
        lambda ps: torch.optim.Adagrad(ps, initial_accumulator_value=0.1),
        lambda ps: torch.optim.RMSprop(ps, momentum=0.1),
        lambda ps: torch.optim.Rprop(ps),
    ],
)
def test_optimizers_of_any_kind_go_on(make, cnn: nn.Sequential) -> None:
    optimizer = make(cnn.parameters())
    x = torch.randn(4, 3, 8, 8)
    step(cnn, [optimizer], x)
    se_fx.apply_squeeze_excite(cnn, min_channels=1, optimizers=[optimizer])
    before = {name: p.clone() for name, p in cnn.named_parameters()}
    step(cnn, [optimizer], x)
    step(cnn, [optimizer], x)
    assert all(not torch.equal(p, before[name]) for name, p in cnn.named_parameters() if "squeeze_excite" in name)
    fresh = make(cnn.parameters())
    fresh.load_state_dict(optimizer.state_dict())


def test_optimizers_that_name_their_parameters(cnn: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(cnn.named_parameters(), lr=0.1)
    se_fx.apply_squeeze_excite(cnn, min_channels=1, optimizers=optimizer)
    (group,) = optimizer.param_groups
    assert dict(zip(group["param_names"], group["params"], strict=True)) == dict(cnn.named_parameters())


def test_a_convs_own_child_called_squeeze_excite_is_not_overwritten() -> None:
    conv = nn.Conv2d(3, 8, 1)
    conv.squeeze_excite = nn.Linear(2, 2)
    model = nn.Sequential(conv)
    se_fx.apply_squeeze_excite(model, min_channels=1)
    assert conv.squeeze_excite.weight.shape == (2, 2)
    assert se_fx.report(model).skipped[0].reason == "has a child of its own called squeeze_excite"


def test_several_optimizers(cnn: nn.Sequential) -> None:
    first, second = torch.optim.SGD(cnn[0].parameters(), lr=1), torch.optim.Adam(cnn[3].parameters())
    se_fx.apply_squeeze_excite(cnn, min_channels=1, optimizers=(first, second))
    assert len(first.param_groups[0]["params"]) == 2 + 2
    assert len(second.param_groups[0]["params"]) == 1 + 2
    step(cnn, [first, second], torch.randn(2, 3, 8, 8))


def test_blocks_of_a_frozen_conv_join_the_first_group(cnn: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(cnn[3].parameters(), lr=1)
    cnn[0].requires_grad_(False)
    se_fx.apply_squeeze_excite(cnn, min_channels=1, optimizers=optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 1 + 2 + 2
    assert all(p.requires_grad for n, p in cnn.named_parameters() if "squeeze_excite" in n)
