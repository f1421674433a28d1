"""Folded models: what they share, and that they copy, rebuild, report, train and compile as any."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from folds import X, assert_same_outputs, blocks, fold, make_constant
from torch import nn

import se_fx


def half_constant(cnn: nn.Module) -> nn.Module:
    """The first block is constant, the second isn't."""
    model = se_fx.transform(cnn, min_channels=1, latent_channels=4, bias=True, example_inputs=X)
    make_constant(blocks(model)["squeeze_excite.of_0"], torch.linspace(0.1, 0.9, 16))
    nn.init.normal_(blocks(model)["squeeze_excite.of_3"].fc2.weight, std=20.0)
    return model


def test_all_but_the_folded_weights_is_shared_and_the_input_is_untouched(cnn: nn.Module) -> None:
    model = half_constant(cnn).train()
    model.get_submodule("1").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    code, plan = model.code, se_fx.Plan.of(model)
    folding = fold(model, 0.02, held_out=[X])
    folded = folding.model.state_dict(keep_vars=True)
    assert all(torch.equal(*pair) for pair in before.values())
    after = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if not name.endswith("_extra_state")}
    assert {name: tensor for name, tensor in after.items() if tensor is not before[name][0]} == {}
    assert (model.code, se_fx.Plan.of(model)) == (code, plan)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert folding.model.training
    assert not folding.model.get_submodule("1").training
    assert [name for name in before if name not in folded] == [name for name in before if "squeeze_excite.of_0." in name]
    new = [name for name in folded if folded[name] is not before[name][0] and not name.endswith("_extra_state")]
    assert new == ["0.weight", "0.bias"]
    assert all(type(folded[name]) is nn.Parameter for name in ("0.weight", "0.bias"))


def test_frozen_weights_stay_frozen_and_the_rest_trains(cnn: nn.Module) -> None:
    model = half_constant(cnn)
    model.get_submodule("0").requires_grad_(False)
    folded = fold(model).model
    assert not folded.get_submodule("0").weight.requires_grad
    folded(X).square().sum().backward()
    assert blocks(folded)["squeeze_excite.of_3"].fc1.weight.grad.abs().sum() > 0


def test_copies(cnn: nn.Module) -> None:
    folded = fold(half_constant(cnn)).model
    for copied in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert_same_outputs(copied, folded)
        assert se_fx.Plan.of(copied) == se_fx.Plan.of(folded)
    again = fold(pickle.loads(pickle.dumps(half_constant(cnn))))
    assert [site.name for site in again.folded] == ["0"]


def test_plan_and_state_dict_rebuild_it(cnn: nn.Module) -> None:
    fresh = copy.deepcopy(cnn)
    folded = fold(half_constant(cnn)).model
    file = io.BytesIO()
    torch.save({"plan": se_fx.Plan.of(folded).to_dict(), "state_dict": folded.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    rebuilt = se_fx.transform(fresh, se_fx.Plan.from_dict(saved["plan"]))
    rebuilt.load_state_dict(saved["state_dict"])
    assert_same_outputs(rebuilt, folded)


def test_report_and_remove_and_a_second_transform(cnn: nn.Module) -> None:
    model = half_constant(cnn)
    folding = fold(model)
    report = se_fx.report(folding.model, X)
    assert [site.name for site in report.sites] == ["3"]
    assert {skip.name: skip.reason for skip in report.skipped} == {"0": "its gate was constant, and is folded"}
    assert folding.saved == se_fx.report(model, X).added - report.added
    assert report.base == se_fx.report(model, X).base
    plain = se_fx.remove(folding.model)
    assert type(plain) is nn.Sequential
    assert list(plain.state_dict()) == list(cnn.state_dict())
    torch.testing.assert_close(plain[0].weight, cnn[0].weight * torch.linspace(0.1, 0.9, 16)[:, None, None, None])
    assert len(blocks(se_fx.transform(folding.model, min_channels=1, latent_channels=4))) == 2


def test_nothing_left(cnn: nn.Module) -> None:
    model = se_fx.transform(cnn, min_channels=1, latent_channels=4, init="identity")
    folded = fold(model, 0.0).model
    assert len(se_fx.Plan.of(folded)) == 0
    assert "no Squeeze-and-Excitation block" in str(se_fx.report(folded))
    assert list(folded.state_dict()) == list(cnn.state_dict())
    assert_same_outputs(se_fx.remove(folded), cnn)


def test_a_folded_model_compiles_and_exports(cnn: nn.Module) -> None:
    folded = fold(half_constant(cnn)).model.eval()
    with torch.no_grad():
        compiled = torch.compile(folded, fullgraph=True, backend="eager")(X)
        exported = torch.export.export(folded, (X,)).module()(X)
        assert torch.equal(compiled, folded(X))
        torch.testing.assert_close(exported, folded(X))
