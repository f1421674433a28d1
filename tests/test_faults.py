"""Whatever goes wrong, wherever: the model, its optimizers and all global state are as they were before."""

from __future__ import annotations

import builtins
import contextlib
import gc
import inspect
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace

import se_fx

X = torch.randn(2, 3, 8, 8)
HOME = os.path.dirname(se_fx.__file__) + os.sep


class Unit(nn.Module):
    """A residual unit whose graphs differ by mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + F.dropout(self.norm(self.conv(x)).relu(), 0.1, self.training))


class Branches(nn.Module):
    """It can't be captured as one graph, so that its convs are captured alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Unit(), Branches(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    model[1].norm.eval()
    model[2].conv.weight.requires_grad_(False)
    return model


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Two, one of two groups, which have made some steps."""
    convs, others = [p for p in model.parameters() if p.ndim == 4], [p for p in model.parameters() if p.ndim < 4]
    made = [
        torch.optim.Adagrad([{"params": convs[:1]}, {"params": convs[1:], "lr": 0.1}], lr=1e-3),
        torch.optim.SGD(others, lr=1e-3, momentum=0.9),
    ]
    model(X).sum().backward()
    for optimizer in made:
        optimizer.step()
    return made


def seen(value: Any, depth: int = 4) -> Any:
    """What a value is, to be compared later: tensors by identity and value, containers by their items, all else by identity."""
    if isinstance(value, Tensor):
        return id(value), value._version, value.requires_grad, value.detach().clone().flatten().tolist()
    if isinstance(value, dict) and depth:
        return id(value), [(id(key) if isinstance(key, Tensor) else key, seen(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, list) and depth:
        return id(value), [seen(item, depth - 1) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def world(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """All that must be as before."""
    modules = {f"module {name!r}": (id(m), type(m), seen(m.__dict__)) for name, m in model.named_modules()}
    kept = {f"optimizer {i}": (seen(o.param_groups), seen(o.state)) for i, o in enumerate(optimizers)}
    patched = {
        f"{home.__name__}.{name}": id(value)
        for home in (builtins, torch, torch.utils.checkpoint, nn.Module, nn.Sequential, fx, _symbolic_trace, F)
        for name, value in vars(home).items()
        if callable(value)
    }
    return {
        **modules,
        **kept,
        **patched,
        "torch's generator": torch.get_rng_state().tolist(),
        "Python's generator": random.getstate(),
        "NumPy's generator": (np.random.get_state()[1].tolist(), np.random.get_state()[2:]),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "attention's fast path": torch.backends.mha.get_fastpath_enabled(),
        "garbage collector": gc.isenabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "hooks of all modules": len(nn.modules.module._global_forward_hooks),
    }


def difference(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]


Calls = Counter[str]


def named(code: CodeType) -> str:
    return f"{code.co_filename[len(HOME) : -3]}.{code.co_qualname if hasattr(code, 'co_qualname') else code.co_name}"


@contextlib.contextmanager
def watched(calls: Calls, error: BaseException | None = None, function: str = "", number: int = 0) -> Iterator[None]:
    """Notes the calls of se_fx's functions; raises `error` at the start of one function's call of the given number."""
    resumed: set[Any] = set()  # frames, kept alive: ids of freed ones are used again

    def trace(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(HOME) or code.co_name.startswith("<"):
            return
        if code.co_flags & inspect.CO_GENERATOR:
            if frame in resumed:
                return
            resumed.add(frame)
        name = named(code)
        calls[name] += 1
        if error is not None and name == function and calls[name] == number:
            sys.settrace(None)
            raise error

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)


def functions() -> dict[str, list[FunctionType]]:
    """Those of se_fx that are there now, by name."""
    found: dict[str, list[FunctionType]] = {}
    for each in gc.get_objects():
        if type(each) is FunctionType and each.__code__.co_filename.startswith(HOME):
            found.setdefault(named(each.__code__), []).append(each)
    return found


@contextlib.contextmanager
def struck(function: FunctionType, error: BaseException) -> Iterator[None]:
    """The function's next call raises `error`; as `watched` does, but all else runs at its usual speed."""
    original = function.__code__

    def strike() -> None:
        function.__code__ = original
        raise error

    strikes.append(strike)
    function.__code__ = _struck.__code__
    try:
        yield
    finally:
        function.__code__ = original
        strikes.clear()


strikes: list[Callable[[], None]] = []


def _struck(*args: Any, **kwargs: Any) -> None:
    __import__("test_faults").strikes[0]()  # its globals are another module's


Operation = Callable[[nn.Module, list[torch.optim.Optimizer]], Any]
OPTIONS = {"min_channels": 1, "latent_channels": 2}
OPERATIONS: dict[str, Operation] = {
    "apply": lambda model, optimizers: se_fx.apply_squeeze_excite(model, 2, 1, optimizers),
    "transform": lambda model, _: se_fx.transform(model, placement="residual", seed=0, **OPTIONS),
    "plan": lambda model, _: se_fx.plan(model, example_inputs=X, **OPTIONS),
    "optimize": lambda model, _: se_fx.optimize_for_inference(model.eval()),
    "optimize for training": lambda model, _: se_fx.optimize_for_training(model),
}


def run(operation: Operation, model: nn.Module, optimizers: list[torch.optim.Optimizer], raised: type[BaseException]) -> bool:
    """Whether it raised, as itself or as se_fx's error."""
    try:
        operation(model, optimizers)
    except (raised, se_fx.SqueezeExciteError):
        return True
    return False


def prepared(name: str) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = network()
    optimizers = optimizers_of(model)
    return (model.eval() if name == "optimize" else model), optimizers


def test_an_error_anywhere_leaves_everything_as_it_was() -> None:
    """An interrupt at the start of each function, when it is called first; no memory at that of some, when called last.

    A function that several operations call fails in the first of them alone.
    """
    done: set[str] = set()
    faults: list[tuple[str, str, int, list[str]]] = []
    for name, operation in OPERATIONS.items():
        calls, model, optimizers = Calls(), *prepared(name)
        with watched(calls):
            operation(model, optimizers)
        fresh = sorted(set(calls) - done)
        done |= set(calls)
        places = [(KeyboardInterrupt, function, 1) for function in fresh]
        places += [(MemoryError, function, calls[function]) for function in fresh[::8]]
        model, optimizers = prepared(name)
        raised, there, before = 0, functions(), world(model, optimizers)
        for error, function, number in places:
            known, injected = there.get(function, []), error("injected")
            simple = number == 1 and len(known) == 1 and not known[0].__code__.co_freevars
            with struck(known[0], injected) if simple else watched(Calls(), injected, function, number):
                failed = run(operation, model, optimizers, error)
            raised += failed
            changed = difference(before, world(model, optimizers))
            if failed and changed:
                faults.append((error.__name__, function, number, changed))
            if changed:
                model, optimizers = prepared(name)
                before = world(model, optimizers)
        assert raised > len(places) / 2
    assert not faults, "\n".join(map(str, faults))


def test_a_refusal_computes_no_weight() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 1)), nn.BatchNorm2d(8))
    before = {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}
    with pytest.raises(se_fx.SqueezeExciteError, match="no such place"):
        se_fx.transform(model, placement="residual", min_channels=1)
    assert {name: (buffer, buffer._version) for name, buffer in model.named_buffers()} == before
