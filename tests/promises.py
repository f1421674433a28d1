"""Promises: what holds whatever network and options `transform` was given. Each yields pairs of modules that do the same."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import pickle
import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from networks import Recipe
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import se_fx


@dataclasses.dataclass
class Case:
    """A network, and what `transform` has made of it."""

    recipe: Recipe
    options: dict[str, Any]
    model: nn.Module
    result: nn.Module

    @property
    def planning(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name != "seed"}

    def anew(self) -> nn.Module:
        """Of another network by the same recipe, for what changes its state."""
        return transform(self.recipe.network(), **self.options)

    @property
    def is_identity(self) -> bool:
        return self.options.get("init") != "default"


def transform(model: nn.Module, plan: se_fx.Plan | None = None, **options: Any) -> nn.Module:
    """By one seed: the one in `options`, if there is one, and then the global generator's plays no part."""
    torch.manual_seed(0) if options.get("seed") is None else torch.seed()
    state = torch.get_rng_state()
    result = se_fx.transform(model, plan, **options)
    assert options.get("seed") is None or torch.equal(torch.get_rng_state(), state)
    return result


Pairs = Iterator[tuple[nn.Module, nn.Module]]  # of modules that must do the same


def again(case: Case) -> Pairs:
    """A second transform adds nothing."""
    twice = transform(case.result, **case.options)
    assert twice.state_dict().keys() == case.result.state_dict().keys()
    yield twice, case.result


def removal(case: Case) -> Pairs:
    """`remove` gives the original back: classes, keys, tensors."""
    removed = se_fx.remove(case.result)
    assert [(n, type(m)) for n, m in removed.named_modules()] == [(n, type(m)) for n, m in case.model.named_modules()]
    assert_same_tensors(removed, case.model)
    assert removed.state_dict().keys() == case.model.state_dict().keys()
    yield removed, case.model


def replay(case: Case) -> Pairs:
    """A plan says what `transform` does, and does it again, by way of JSON."""
    plan = se_fx.plan(case.model, **case.planning)
    assert plan.sites == se_fx.Plan.of(case.result).sites
    if not plan.callables:
        plan = se_fx.Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    yield transform(case.model, plan, seed=case.options.get("seed")), case.result


def deep_copy(case: Case) -> Pairs:
    """`copy.deepcopy` works where it does on the original, and shares nothing."""
    try:
        copy.deepcopy(case.model)
    except RuntimeError:
        return
    copied = copy.deepcopy(case.result)
    assert copied.state_dict().keys() == case.result.state_dict().keys()
    assert not {id(tensor) for tensor in copied.parameters()} & {id(tensor) for tensor in case.result.parameters()}
    yield copied, case.result


def pickled(case: Case) -> Pairs:
    """`pickle` works where it does on the original."""
    try:
        pickle.dumps(case.model)
    except (RuntimeError, AttributeError):
        return
    loaded = pickle.loads(pickle.dumps(case.result))
    assert loaded.state_dict().keys() == case.result.state_dict().keys()
    yield loaded, case.result
    yield se_fx.remove(loaded), case.model


def in_place(case: Case) -> Pairs:
    """`apply_squeeze_excite` keeps class, keys and Parameter objects; each new parameter is in one group of one optimizer."""
    model = case.recipe.network()
    parameters, keys = list(model.parameters()), model.state_dict().keys()
    tensors = {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if not key.endswith("_extra_state")}
    half = len(parameters) // 2 or 1
    optimizers = [torch.optim.SGD(parameters[:half], 0.1, momentum=0.9), torch.optim.AdamW(parameters[half:] or parameters[:0])]
    for _ in range(2):  # the second time, nothing more
        se_fx.apply_squeeze_excite(model, 2, case.options["min_channels"], optimizers, seed=case.options.get("seed"))
    assert isinstance(model, type(case.model))
    assert all(model.state_dict(keep_vars=True)[key] is tensor for key, tensor in tensors.items())
    assert is_new(model.state_dict().keys() - keys)
    joined = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, joined)) == sorted(map(id, model.parameters()))
    new = list(se_fx.blocks_of(model).values())
    removed = se_fx.remove(model)
    for block in new:  # gates of 2 * sigmoid(0)
        block.gate_scale = 2.0
        nn.init.zeros_(block.fc2.weight)
    yield model, case.model
    yield removed, case.model


def reports(case: Case) -> Pairs:
    """Reports are made without example inputs, too, and are JSON."""
    report = se_fx.report(case.result)
    json.dumps(report.to_dict())
    assert all(site.name in str(report) for site in report.sites)
    assert str(se_fx.suggest(case.model))
    yield from ()


def costs(case: Case) -> Pairs:
    """MACs are what PyTorch counts, to the last digit."""
    recipe = countable(case.recipe)
    if recipe is None:
        return
    result, (args, kwargs) = case.anew(), recipe.arguments()
    with FlopCounterMode(display=False) as counter, no_fast_attention(), torch.no_grad():
        result.eval()(*args, **kwargs)
    report = se_fx.report(result, args or kwargs)
    assert 2 * (report.base.macs + report.added.macs) == counter.get_total_flops()
    json.dumps(report.to_dict())
    assert str(report)
    yield from ()


def costs_before(case: Case) -> Pairs:
    """A plan's costs are the result's."""
    recipe = countable(case.recipe)
    if recipe is None:
        return
    args, kwargs = recipe.arguments()
    example = args or kwargs
    plan = se_fx.plan(case.model, example_inputs=example, **case.planning)
    result = transform(case.model, example_inputs=example, **case.options)
    made = se_fx.Plan.of(result)
    assert (made.sites, made.base, made.skipped, made.measured) == (plan.sites, plan.base, plan.skipped, True)
    yield result, case.result


def inference(case: Case) -> Pairs:
    """An optimised model's outputs are close: in float64, where sums in another order agree to 12 digits."""
    recipe = dataclasses.replace(case.recipe, dtype=torch.float64)
    options = {**case.options, "seed": 0}
    result, again = (transform(recipe.network(), **options).eval() for _ in range(2))  # which share no buffers: code may count
    optimized = se_fx.optimize_for_inference(again)
    assert str(se_fx.report(optimized))
    (expected, _), (found, _) = (called(model, recipe) for model in (result, optimized))
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11, equal_nan=True)
        else:
            assert a == b
    yield from ()


def training(case: Case) -> Pairs:
    """A model optimised for training does the same in both modes, and gives its parameters the same gradients."""
    result, optimized = case.anew(), se_fx.optimize_for_training(case.anew())
    expected, found = (gradients_of(model, case.recipe) for model in (result, optimized))
    if isinstance(expected, dict):
        assert isinstance(found, dict), found
        # Of a bias before a norm, it is nothing but what rounding leaves of the others.
        largest = max((float(each.abs().max()) for each in expected.values() if each is not None), default=0.0)
        for name, gradient in expected.items():
            assert (gradient is None) == (found[name] is None), name
            if gradient is not None:
                noise = 4 * torch.finfo(gradient.dtype).eps * largest
                atol = 1e-3 * float(gradient.abs().max()) + noise
                torch.testing.assert_close(found[name], gradient, rtol=1e-2, atol=atol, equal_nan=True)
    assert_same_tensors(se_fx.optimize_for_training(case.result), case.result)
    yield se_fx.optimize_for_training(case.result), case.result


def gradients(case: Case) -> Pairs:
    """Where the original trains, so does the result: at identity, with the same gradients of the original's parameters."""
    expected, found = (gradients_of(model, case.recipe) for model in (case.recipe.network(), case.anew()))
    if isinstance(expected, dict):
        assert isinstance(found, dict), found
        for name, gradient in expected.items() if case.is_identity else ():
            assert equal(found[name], gradient), (name, found[name], gradient)
    yield from ()


def placed_in_place(case: Case) -> Pairs:
    """`apply_squeeze_excite` with all options: the same keys as `transform`'s result, and the same function."""
    model = case.recipe.network()
    torch.manual_seed(0) if case.options.get("seed") is None else torch.seed()
    se_fx.apply_squeeze_excite(model, **{"latent_channels": 64, "min_channels": 128, **case.options})
    assert isinstance(model, type(case.model))
    assert model.state_dict().keys() == case.result.state_dict().keys()
    assert se_fx.Plan.of(model).sites == se_fx.Plan.of(case.result).sites
    yield model, case.result
    yield se_fx.remove(model), case.model


def afterwards(case: Case) -> Pairs:
    """Whatever is done to a result afterwards does to it what it does to the original, or an error says no."""
    if not case.is_identity:
        return
    for name in random.Random(f"{case.recipe}").sample(list(CHANGES), 2):
        change = CHANGES[name]
        model, result, changed = case.recipe.network(), case.anew(), case.recipe.network()
        in_place = case.recipe.network()
        se_fx.apply_squeeze_excite(in_place, **{"latent_channels": 64, "min_channels": 128, **case.options})
        start = {key: buffer.clone() for key, buffer in model.named_buffers()}
        paths = [path for path, module in model.named_modules() if path and is_whole(module)]
        path = random.Random(f"{case.recipe}{name}").choice(paths)
        change(changed, path)
        expected = behaviour(changed, case.recipe, start)
        for each in (result, in_place):
            try:
                change(each, path)
                found = behaviour(each, case.recipe, start)
            except se_fx.SqueezeExciteError:
                continue
            if any(isinstance(leaf, type) and issubclass(leaf, se_fx.SqueezeExciteError) for leaf in found):
                continue
            assert_equal(found, expected)
    yield from ()


def is_whole(module: nn.Module) -> bool:
    """Whether a module can be changed by itself: it is no part of another's parametrization, attention or recurrence."""
    return type(module).forward is not nn.Module.forward and "torch.nn.utils" not in type(module).__module__


def hook(model: nn.Module, path: str) -> None:
    model.get_submodule(path).register_forward_hook(
        lambda module, args, output: output * 2 if isinstance(output, Tensor) else None
    )


def hook_before(model: nn.Module, path: str) -> None:
    model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: tuple(-arg if isinstance(arg, Tensor) else arg for arg in args)
    )


def attribute(model: nn.Module, path: str) -> None:
    for module in model.get_submodule(path).modules():
        if not type(module).__module__.startswith(("torch.", "se_fx")):
            for name, value in list(module.__dict__.items()):
                if not name.startswith("_") and name != "training" and type(value) in (bool, float):
                    setattr(module, name, not value if type(value) is bool else value + 0.5)


def identity(model: nn.Module, path: str) -> None:
    model.set_submodule(path, nn.Identity())


def own_forward(model: nn.Module, path: str) -> None:
    module = model.get_submodule(path)
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs)


def mode(model: nn.Module, path: str) -> None:
    module, train = model.get_submodule(path), type(model).train
    model.train = lambda training=True: (train(model, training), module.eval(), model)[-1]


CHANGES = {each.__name__: each for each in (hook, hook_before, attribute, identity, own_forward, mode)}

FIRST = [placed_in_place, afterwards, again, removal, replay, deep_copy, pickled, in_place]
SECOND = [costs, costs_before, inference, training, gradients, reports]


# ----------------------------------------------------------------------------------------------------- what is compared
def behaviour(model: nn.Module, recipe: Recipe, start: dict[str, Tensor]) -> list[Any]:
    """What a network returns or raises in both modes, what it does to its arguments, and its buffers afterwards."""
    seen = []
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in start}
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(start[name])
        for training in (True, False):
            outputs, given = called(model.train(training), recipe)
            seen += [*outputs, *given]
    return [*seen, *flat({name: buffer.clone() for name, buffer in buffers.items()})]


def called(model: nn.Module, recipe: Recipe) -> tuple[list[Any], list[Any]]:
    """What a call returns or raises, and its arguments afterwards, as flat lists; and which tensors share memory."""
    torch.manual_seed(1)
    arguments = recipe.arguments()
    try:
        outputs = flat(model(*arguments[0], **arguments[1]))
    except Exception as error:
        outputs = [type(error), str(error)]
    given = flat(arguments)
    memory = [each.untyped_storage().data_ptr() for each in (*outputs, *given) if isinstance(each, Tensor) and each.numel()]
    return [*outputs, *(memory.index(pointer) for pointer in memory)], given


def countable(recipe: Recipe) -> Recipe | None:
    """A recipe whose call costs something: some operators can't be faked on an empty batch; None where the call raises."""
    recipe = dataclasses.replace(recipe, batch=recipe.batch or 1)
    first = called(recipe.network().eval(), recipe)[0][0]
    return None if isinstance(first, type) and issubclass(first, Exception) else recipe


def flat(value: Any) -> list[Any]:
    """The leaves of nested containers, dataclasses included, and the containers' classes."""
    if dataclasses.is_dataclass(value):
        return [type(value), *flat(vars(value))]
    if isinstance(value, dict):
        return [type(value), *value, *(leaf for item in value.values() for leaf in flat(item))]
    if isinstance(value, (tuple, list)):
        return [type(value), *(leaf for item in value for leaf in flat(item))]
    return [value]


def equal(a: Any, b: Any) -> bool:
    """Whether two leaves are the same: tensors bitwise, and in the same layout; NaNs are alike."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    return kind(a) == kind(b) and (torch.equal(a, b) or torch.equal(a.nan_to_num(1e4), b.nan_to_num(1e4)))


def kind(tensor: Tensor) -> tuple[Any, ...]:
    strides = [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1 and tensor.numel()]
    return tensor.dtype, tensor.device, tensor.shape, strides


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected), (found, expected)
    for a, b in zip(found, expected, strict=True):
        assert equal(a, b), (a, b)


def assert_same_tensors(found: nn.Module, expected: nn.Module) -> None:
    tensors = found.state_dict(keep_vars=True)
    for key, value in expected.state_dict(keep_vars=True).items():  # what a block says of itself is written anew each time
        assert torch.equal(tensors[key], value) if key.endswith("_extra_state") else tensors[key] is value, key


def is_new(keys: Iterable[str]) -> bool:
    return all("squeeze_excite" in key.split(".") for key in keys)


def description(model: nn.Module) -> list[Any]:
    """All of a model that a transform could change by mistake."""
    modules = [(name, type(m), m.training, len(m._forward_hooks), *map(str, m.__dict__)) for name, m in model.named_modules()]
    return [modules, [(key, t._version, t.requires_grad) for key, t in model.state_dict(keep_vars=True).items()]]


def gradients_of(model: nn.Module, recipe: Recipe) -> dict[str, Tensor | None] | str:
    """The gradients of a sum over all outputs in training mode, or why there are none."""
    torch.manual_seed(1)
    args, kwargs = recipe.arguments()
    try:
        outputs = flat(model.train()(*args, **kwargs))
        sum(leaf.square().sum() for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad).backward()
    except Exception as error:
        return str(error)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@contextlib.contextmanager
def no_fast_attention() -> Iterator[None]:
    """Attention operator by operator: PyTorch's counter doesn't know its fused kernel."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
