"""`transform`: what it inserts, what it keeps, what it refuses."""

from __future__ import annotations

import copy
import pickle
import random
import threading

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

import se_fx


def inserted(gm: nn.Module) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "call_module" and "squeeze_excite" in str(node.target).split(".")]


# ---------------------------------------------------------------------------------------------------------------- sites
def convs_with(model: nn.Module, least: int) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.out_channels >= least]


def test_resnet50_gets_one_block_for_every_conv_of_512_or_more_output_channels() -> None:
    model = torchvision.models.resnet50()
    before = {key: (value, value.clone()) for key, value in model.state_dict(keep_vars=True).items()}
    modules = dict(model.named_modules())
    gm = se_fx.transform(model, min_channels=512, latent_channels=64)

    assert isinstance(gm, fx.GraphModule)
    expected = convs_with(model, 512)
    assert len(expected) == 22
    assert [site.name for site in se_fx.report(gm).sites] == expected
    for node in inserted(gm):
        (conv,) = node.args
        host, _, name = conv.target.rpartition(".")
        assert node.target == f"{host}.squeeze_excite.of_{name}"
        assert list(conv.users) == [node]  # all other users read the scaled value
        block = gm.get_submodule(node.target)
        assert (block.num_features, block.latent_channels) == (gm.get_submodule(conv.target).out_channels, 64)

    state = gm.state_dict(keep_vars=True)
    assert all(state[key] is value for key, (value, _) in before.items())
    assert all("squeeze_excite" in key.split(".") for key in state.keys() - before.keys())
    assert len(state) == len(before) + 3 * 22
    assert all(torch.equal(value, then) for value, then in before.values())
    assert dict(model.named_modules()) == modules
    assert not any("squeeze_excite" in key for key in model.state_dict())
    missing, unexpected = gm.load_state_dict(torchvision.models.resnet50().state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == state.keys() - before.keys()


def test_out_channels_count_not_in_channels() -> None:
    model = nn.Sequential(nn.Conv2d(512, 8, 1), nn.Conv2d(8, 512, 1))
    assert [site.name for site in se_fx.plan(model, min_channels=512).sites] == ["1"]


def test_nodes_carry_the_module_stack_of_their_conv() -> None:
    gm = se_fx.transform(torchvision.models.resnet18(), min_channels=512)
    for node in inserted(gm):
        stack = node.meta["nn_module_stack"]
        assert list(stack)[:-1] == list(node.args[0].meta["nn_module_stack"])
        assert list(stack.values())[-1] == (node.target, se_fx.SqueezeExcite2d)


def test_new_parameters_follow_the_convs_device_dtype_and_mode(cnn: nn.Sequential) -> None:
    cnn.double()
    gm = se_fx.transform(cnn, min_channels=1)
    assert {p.dtype for p in gm.parameters()} == {torch.float64}
    gm = se_fx.transform(copy.deepcopy(cnn).to("meta").eval(), min_channels=1)
    assert {p.device.type for p in gm.parameters()} == {"meta"}
    assert not any(module.training for module in gm.modules() if isinstance(module, se_fx.SqueezeExcite2d))


def test_latent_channels_as_a_fraction_of_the_channels(cnn: nn.Sequential) -> None:
    assert [site.latent_channels for site in se_fx.plan(cnn, min_channels=1, latent_channels=1 / 8).sites] == [2, 4]


def test_min_channels_auto() -> None:
    assert {s.channels for s in se_fx.plan(torchvision.models.resnet50(), min_channels="auto").sites} == {512, 1024, 2048}
    assert {
        s.channels for s in se_fx.plan(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 24, 1)), min_channels="auto").sites
    } == {24}


def test_where_takes_patterns_and_predicates() -> None:
    model = torchvision.models.resnet18()
    names = lambda where: [site.name for site in se_fx.plan(model, min_channels=1, where=where).sites]  # noqa: E731
    assert names("layer4.0.*") == ["layer4.0.conv1", "layer4.0.conv2", "layer4.0.downsample.0"]
    assert names(["layer4.0.*", "!*.downsample.*"]) == ["layer4.0.conv1", "layer4.0.conv2"]
    assert names(["!layer*"]) == ["conv1"]
    assert names(lambda name, module: module.kernel_size == (7, 7)) == ["conv1"]


def test_a_second_transform_adds_nothing(cnn: nn.Sequential) -> None:
    once = se_fx.transform(cnn, min_channels=1)
    twice = se_fx.transform(once, min_channels=1)
    assert twice.state_dict().keys() == once.state_dict().keys()
    assert len(inserted(twice)) == 2
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(once.eval()(x), twice.eval()(x))
    assert [s.reason for s in se_fx.plan(once, min_channels=1).skipped] == ["has a Squeeze-and-Excitation block already"] * 2
    again = se_fx.transform(torchvision.models.resnet18(), min_channels=512)
    assert se_fx.transform(again, min_channels=512).state_dict().keys() == again.state_dict().keys()


def test_replaying_a_plan_on_its_own_result_adds_nothing() -> None:
    conv = nn.Conv2d(3, 256, 1)
    for model in (conv, nn.Sequential(conv)):
        plan = se_fx.plan(model)
        once = se_fx.transform(model, plan)
        twice = se_fx.transform(once, plan)
        assert twice.state_dict().keys() == once.state_dict().keys()
        assert len(se_fx.report(twice).sites) == 1
        assert se_fx.remove(twice).state_dict().keys() == model.state_dict().keys()


def test_under_another_default_device(cnn: nn.Sequential) -> None:
    with torch.device("meta"):
        assert {p.device.type for p in se_fx.transform(cnn, min_channels=1, init="identity").parameters()} == {"cpu"}


def test_a_second_transform_can_add_more(cnn: nn.Sequential) -> None:
    once = se_fx.transform(cnn, min_channels=32, init="identity")
    twice = se_fx.transform(once, min_channels=1, init="identity")
    assert {s.name for s in se_fx.report(twice).sites} == {"0", "3"}
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(twice.eval()(x), cnn.eval()(x))
    assert type(se_fx.remove(twice)) is nn.Sequential


def test_a_shared_conv_has_one_block_applied_at_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.same = self.conv

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.same(torch.relu(self.conv(x)))

    model = Twice()
    gm = se_fx.transform(model, min_channels=1, latent_channels=2)
    assert len(inserted(gm)) == 2
    assert len({node.target for node in inserted(gm)}) == 1
    block, x = gm.get_submodule(inserted(gm)[0].target), torch.randn(1, 4, 6, 6)
    assert torch.equal(gm(x), block(model.conv(torch.relu(block(model.conv(x))))))
    assert {"conv.weight", "same.weight"} <= gm.state_dict().keys()


def test_a_lone_conv_stays_a_conv() -> None:
    conv = nn.Conv2d(3, 256, 3)
    result = se_fx.transform(conv)
    assert isinstance(result, nn.Conv2d)
    weights = [key for key in result.state_dict() if not key.endswith("._extra_state")]
    assert weights == ["weight", "bias", "squeeze_excite.of_conv.fc1.weight", "squeeze_excite.of_conv.fc2.weight"]
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(result(x), se_fx.blocks_of(result)[""](conv(x)))
    assert torch.equal(se_fx.remove(result)(x), conv(x))
    assert [site.name for site in se_fx.report(result, x).sites] == [""]


# ------------------------------------------------------------------------------------------------------- pipeline's end
def test_compiles_as_one_graph_close_to_eager(cnn: nn.Sequential) -> None:
    gm = se_fx.transform(cnn, min_channels=1).eval()
    x = torch.randn(2, 3, 8, 8)
    # Inductor reorders sums: fp32's default tolerances.
    torch.testing.assert_close(torch.compile(gm, fullgraph=True)(x), gm(x))


def test_trains(cnn: nn.Sequential) -> None:
    gm = se_fx.transform(cnn, min_channels=1, init="identity")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(4, 3, 8, 8)
    before = {key: value.clone() for key, value in gm.named_parameters()}
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (gm(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(
        not torch.equal(value, before[key]) for key, value in gm.named_parameters() if "fc2" in key or "squeeze" not in key
    )


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
def test_copies_are_whole(duplicate, cnn: nn.Sequential) -> None:
    cnn.register_buffer("extra", torch.ones(1), persistent=False)
    cnn.num_classes = 7
    cnn[1].eval()
    gm = se_fx.transform(cnn, min_channels=1)
    copied = duplicate(gm)
    x = torch.randn(2, 3, 8, 8)
    gm.eval(), copied.eval()
    assert torch.equal(copied(x), gm(x))
    assert copied.state_dict().keys() == gm.state_dict().keys()
    assert copied.num_classes == 7
    assert str(se_fx.report(copied)) == str(se_fx.report(gm))
    assert type(se_fx.remove(copied)) is nn.Sequential


def test_a_copys_graph_is_its_own(cnn: nn.Sequential) -> None:
    gm = se_fx.transform(cnn, min_channels=1).eval()
    copied, x = copy.deepcopy(gm), torch.randn(1, 3, 8, 8)
    expected = gm(x)
    output = next(iter(reversed(copied.graph.nodes)))
    with copied.graph.inserting_before(output):
        output.args = (copied.graph.call_function(torch.neg, output.args),)
    copied.recompile()
    assert torch.equal(copied(x), -expected)
    assert torch.equal(gm(x), expected)


def test_remove_gives_the_original_back() -> None:
    model = torchvision.models.resnet18().eval()
    removed = se_fx.remove(se_fx.transform(model, min_channels=1))
    assert type(removed) is torchvision.models.ResNet
    assert list(removed.state_dict()) == list(model.state_dict())
    state = removed.state_dict(keep_vars=True)
    assert all(state[key] is value for key, value in model.state_dict(keep_vars=True).items())
    assert set(removed.__dict__) == set(model.__dict__)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(removed(x), model(x))
    assert len(se_fx.plan(removed, min_channels=512).sites) == len(convs_with(model, 512))


def test_a_users_own_graph_module_goes_in_and_comes_back(cnn: nn.Sequential) -> None:
    traced = fx.symbolic_trace(cnn.eval())
    gm = se_fx.transform(traced, min_channels=1, init="identity")
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(gm(x), traced(x))
    for changed in (gm, pickle.loads(pickle.dumps(gm)), copy.deepcopy(gm)):
        back = se_fx.remove(changed)
        assert not inserted(back)
        assert isinstance(back, fx.GraphModule)
        assert torch.equal(back(x), traced(x))


# ------------------------------------------------------------------------------------------------------------- refusals
def test_nothing_to_insert_is_no_error(cnn: nn.Sequential) -> None:
    gm = se_fx.transform(cnn.eval(), min_channels=1000)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(gm(x), cnn(x))
    assert gm.state_dict().keys() == cnn.state_dict().keys()
    text = str(se_fx.report(gm, x))
    assert "no Squeeze-and-Excitation block was inserted" in text
    assert "output channels < min_channels=1000" in text


def test_transform_leaves_global_state_alone(cnn: nn.Sequential) -> None:
    patched = nn.Module.__call__, nn.Module.__getattr__, torch.utils.checkpoint.checkpoint
    numbers, state = random.getstate(), torch.get_rng_state()
    se_fx.plan(cnn, min_channels=1, example_inputs=torch.zeros(1, 3, 8, 8))
    assert random.getstate() == numbers
    assert torch.equal(torch.get_rng_state(), state)
    assert (nn.Module.__call__, nn.Module.__getattr__, torch.utils.checkpoint.checkpoint) == patched
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_other_threads_may_transform_and_run_models_meanwhile() -> None:
    models = [torchvision.models.resnet18(), torchvision.models.mobilenet_v2()]
    results: dict[int, nn.Module] = {}

    def work(index: int) -> None:
        for _ in range(3):
            results[index] = se_fx.transform(models[index], min_channels=256, init="identity")

    def run() -> None:
        bystander = torchvision.models.squeezenet1_1().eval()
        shapes = {bystander(torch.randn(1, 3, 64, 64)).shape for _ in range(30)}
        results[2] = bystander if shapes == {(1, 1000)} else None

    threads = [threading.Thread(target=work, args=(0,)), threading.Thread(target=work, args=(1,)), threading.Thread(target=run)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[2] is not None
    x = torch.randn(2, 3, 64, 64)
    for index, model in enumerate(models):
        assert torch.equal(results[index].eval()(x), model.eval()(x))


class Around(nn.Module):
    """A model around another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Conv2d(16, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


class Choosing(Around):
    """It runs its own code."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.isfinite().any() else x


@pytest.mark.parametrize("kind", [Around, Choosing])
@pytest.mark.parametrize("inner", [nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU()), nn.Conv2d(3, 16, 1)], ids=["graph", "conv"])
def test_blocks_of_modules_within_are_kept(kind: type[Around], inner: nn.Module) -> None:
    model = kind(se_fx.transform(inner, min_channels=1, latent_channels=4)).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    rewritten = se_fx.transform(model, min_channels=1, latent_channels=4, init="identity")
    kept = rewritten.state_dict(keep_vars=True)
    before = {key: value for key, value in model.state_dict(keep_vars=True).items() if not key.endswith("_extra_state")}
    assert all(kept[key] is value for key, value in before.items())
    assert torch.equal(rewritten(x), expected)
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for each in (rewritten, se_fx.transform(rewritten, min_channels=1), copy.deepcopy(rewritten)):
        assert {site.name for site in se_fx.Plan.of(each).sites} == names
    report = se_fx.report(rewritten, x)
    assert report.added.params == 2 * 16 * 4 + 2 * 32 * 4
    assert report.base.params == sum(p.numel() for p in kind(inner).parameters())
    assert se_fx.remove(rewritten).state_dict().keys() == kind(inner).state_dict().keys()
    se_fx.apply_squeeze_excite(model, min_channels=1)
    assert {site.name for site in se_fx.Plan.of(model).sites} == names
