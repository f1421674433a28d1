"""Benchmarks: how long calls of several models take, and what memory they need, measured side by side.

One round times every model once, each next to the others, so that what slows the machine down for a while slows all of
them down. Ratios are taken within rounds: these are the figures to compare by.
"""

from __future__ import annotations

import contextlib
import copy
import math
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from se_fx.arguments import as_device, check_flag, check_floating, is_count, is_number
from se_fx.capture import random_state, set_random_state
from se_fx.cost import Call, as_call, describe_call
from se_fx.errors import SqueezeExciteError, reason_of, shown
from se_fx.measure.memory import peak_bytes
from se_fx.measure.progress import progress_bar
from se_fx.measure.timings import Benchmark, Row
from se_fx.optimize import optimize_for_training
from se_fx.planning import plan_of
from se_fx.transform import remove

__all__ = ["Benchmark", "Row", "bench"]

Cell = tuple[str, str]  # name of a model, mode
MODES: dict[bool | str, tuple[str, ...]] = {False: ("eager",), True: ("compiled",), "both": ("eager", "compiled")}


def bench(
    models: Mapping[str, nn.Module] | nn.Module,
    example_inputs: Any = None,
    *,
    batch_sizes: Sequence[int] = (1,),
    compiled: bool | str = False,
    backend: str | Mapping[str, str] = "inductor",
    freezing: bool = False,
    training: bool = False,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = None,
    rounds: int = 15,
    min_seconds: float = 0.05,
    progress: bool = True,
) -> Benchmark:
    """Time calls of several models side by side, and measure their memory.

    The models are copied first, and come out as they went in: modes, parameters, buffers, gradients. So do all random
    number generators. Each copy is called to warm up (which compiles it), to find how many calls fill a timing, and once
    to measure memory; then come the rounds.

    Peak memory is the most that is allocated at a time, beyond what was before the call: activations, gradients, outputs
    and the operators' own workspace. On CUDA it is `torch.cuda.max_memory_allocated`, less what was allocated before; on
    the CPU, the allocations and releases of PyTorch's allocator in the calling thread, as `torch.profiler` records them.

    Args:
        models: modules by name, the baseline first; or one rewritten model, to be compared with its original, and in training
            also with what `optimize_for_training` makes of it.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Dimension 0 of every
            tensor is the batch; its samples are repeated. Tensors on the meta device are filled with random numbers.
        batch_sizes: numbers of samples in a call, each measured for itself.
        compiled: False: as they are; True: under `torch.compile`, anew for each batch size; "both": either way.
        backend: of `torch.compile`: ``"inductor"``, ``"se_fx"`` or another one's name; a mapping has those of some models, by
            name, and Inductor is for the rest.
        freezing: compile with Inductor's `freezing`, which takes the weights for constants: it folds batch norms into
            convs, and packs weights as the kernels like them. For inference only. Code that was compiled without would be
            used again, so `torch.compiler.reset` is called before and after: whatever else is compiled, compiles anew.
        training: time a training step, in train mode: forward, the mean of all floating-point outputs, backward. Else
            inference, in eval mode, under `torch.inference_mode`.
        channels_last: convert weights and inputs of 4 dimensions to that memory format.
        dtype: convert floating-point weights and inputs to this dtype, such as `torch.bfloat16`; None leaves them.
        autocast: run under autocast to this dtype, `torch.bfloat16` or `torch.float16`.
        device: "cpu" or a CUDA device; None is that of the models' parameters.
        rounds: how often each model is timed, at least 1.
        min_seconds: the least that one timing lasts, in seconds; calls are repeated to fill it.
        progress: show a progress bar on stderr, if tqdm is installed.

    Raises:
        SqueezeExciteError: an argument is not what is expected, or a model can't be copied, compiled or called.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> models = {"all": net, "first": net[0]}
    >>> result = bench(models, torch.zeros(1, 3, 8, 8), batch_sizes=(1, 4), rounds=2, min_seconds=0, progress=False)
    >>> [(row.model, row.batch_size) for row in result.rows]
    [('all', 1), ('first', 1), ('all', 4), ('first', 4)]
    """
    _check(batch_sizes, rounds, min_seconds, dtype, autocast)
    _check_modes(compiled, freezing, training, channels_last)
    named = _named(models, training)
    backends = _backends(backend, named, bool(compiled))
    call, where, modes = as_call(example_inputs), _device(named, device), MODES[compiled]
    rows: list[Row] = []
    ticks = len(batch_sizes) * len(named) * len(modes) * (rounds + 1)
    form = _Form(where, dtype, channels_last)
    with _surroundings(where, "compiled" in modes, freezing), progress_bar("bench", "timing", ticks, progress) as tick:
        copies = {name: _copied(name, model, form).train(training) for name, model in named.items()}
        runs = {
            (name, mode): _compiled(model, backends[name]) if mode == "compiled" else model
            for mode in modes
            for name, model in copies.items()
        }
        for batch_size in batch_sizes:
            inputs = _batch(call, batch_size, form)
            steps = {cell: _Step(model, inputs, training, where, autocast) for cell, model in runs.items()}
            rows += _measured(steps, batch_size, rounds, min_seconds, tick)
    baseline = next(iter(named))
    dtypes = (parameter.dtype for parameter in copies[baseline].parameters() if parameter.is_floating_point())
    return Benchmark(
        rows=tuple(rows),
        baseline=baseline,
        training=training,
        freezing=freezing,
        channels_last=channels_last,
        dtype=str(next(dtypes, dtype or torch.get_default_dtype())).removeprefix("torch."),
        autocast=str(autocast).removeprefix("torch.") if autocast else None,
        rounds=rounds,
        device=str(where),
        machine=f"{_processor(where)}, threads: {torch.get_num_threads()}, torch {torch.__version__}",
    )


# -------------------------------------------------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class _Step:
    """What is timed: one call of a model, or one training step."""

    model: nn.Module
    inputs: Call
    training: bool
    device: torch.device
    autocast: torch.dtype | None

    def __call__(self) -> None:
        args, kwargs = self.inputs
        with torch.inference_mode(not self.training):
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                output = self.model(*args, **kwargs)
                loss = _loss(output) if self.training else None
            if loss is not None:
                loss.backward()  # type: ignore[no-untyped-call]
                self.model.zero_grad(set_to_none=True)


def _loss(output: Any) -> Tensor:
    floating = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not any(leaf.requires_grad for leaf in floating):
        raise SqueezeExciteError("no output has a gradient; unfreeze parameters, or pass training=False")
    return torch.stack([leaf.mean(dtype=torch.float32) for leaf in floating]).sum()


def _measured(
    steps: Mapping[Cell, _Step], batch_size: int, rounds: int, min_seconds: float, tick: Callable[[], object]
) -> list[Row]:
    numbers, peaks = {}, {}
    for (name, mode), step in steps.items():
        try:
            step()
        except Exception as error:
            raise SqueezeExciteError(
                f"models[{name!r}]: {'a training step' if step.training else 'inference'} ({mode}) failed with "
                f"{describe_call(step.inputs)}; check example_inputs and batch_sizes. {reason_of(error)}"
            ) from error
        numbers[name, mode] = _number(step, min_seconds)
        peaks[name, mode] = peak_bytes(step, step.device)
        tick()
    seconds: dict[Cell, list[float]] = {cell: [] for cell in steps}
    for round_ in range(rounds):
        for cell in _order(list(steps), round_):
            seconds[cell].append(_seconds(steps[cell], numbers[cell]))
            tick()
    (baseline, _), *_ = steps
    rows = {cell: Row(*cell, batch_size, tuple(times), (), peaks[cell]) for cell, times in seconds.items()}
    return [row.against(rows[baseline, row.mode]) for row in rows.values()]


def _order(cells: list[Cell], round_: int) -> list[Cell]:
    """A B D C, C D B A, B C A D, D A C B, and so on: each cell at each place, and next after each other, equally often.

    That is a design of Williams' (1949): a zigzag through the cells, turned by one cell each other round, else reversed.
    """
    zigzag = [(place + 1) // 2 * (1 if place % 2 else -1) for place in range(len(cells))]
    turned = [cells[(round_ // 2 + step) % len(cells)] for step in zigzag]
    return turned[::-1] if round_ % 2 else turned


def _number(step: Callable[[], None], min_seconds: float) -> int:
    """How many calls last `min_seconds`."""
    number, seconds = 1, _seconds(step, 1)
    while number * seconds < min_seconds:
        number = max(number + 1, math.ceil(1.1 * min_seconds / seconds))
        seconds = _seconds(step, number)
    return number


def _seconds(step: Callable[[], None], number: int) -> float:
    """Seconds that each of `number` calls takes; the timer makes a few more before, to warm up."""
    from torch.utils.benchmark import Timer  # slow to import, and warns where a CUDA toolkit finds no GPU

    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return float(timer.timeit(number).median)


# ------------------------------------------------------------------------------------------------------------ preparation
@dataclass(frozen=True)
class _Form:
    """What tensors are converted to."""

    device: torch.device
    dtype: torch.dtype | None
    channels_last: bool


def _copied(name: str, model: nn.Module, form: _Form) -> nn.Module:
    try:
        copied = copy.deepcopy(model).to(form.device, form.dtype)
        return copied.to(memory_format=torch.channels_last) if form.channels_last else copied
    except Exception as error:
        raise SqueezeExciteError(f"models[{name!r}]: can't be copied to {form.device}. {reason_of(error)}") from error


def _compiled(model: nn.Module, backend: str) -> nn.Module:
    return cast("nn.Module", torch.compile(model, dynamic=False, backend=backend))


def _batch(call: Call, batch_size: int, form: _Form) -> Call:
    """A call with `batch_size` samples, those of `call` over and over."""

    def prepared(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.device.type == "meta":
            tensor = torch.rand(tensor.shape).to(tensor.dtype)  # integers: zeros
        if tensor.dim():
            tensor = tensor[torch.arange(batch_size, device=tensor.device) % len(tensor)]
        tensor = tensor.to(form.device, form.dtype if tensor.is_floating_point() else None)
        return tensor.contiguous(memory_format=torch.channels_last) if form.channels_last and tensor.dim() == 4 else tensor

    lengths = [len(leaf) for leaf in tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim()]
    if not lengths or not all(lengths):
        raise SqueezeExciteError(f"example_inputs: expected a tensor with samples in dimension 0, got {describe_call(call)}")
    return cast("Call", tree_map_only(Tensor, prepared, call))


@contextlib.contextmanager
def _surroundings(device: torch.device, compiles: bool, freezing: bool) -> Iterator[None]:
    """Within, grad mode and generators are the benchmark's own, and `torch.compile` never gives up on a new batch size."""
    state, cuda = random_state(), [device] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.callback(set_random_state, state)
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if cuda:
            stack.enter_context(torch.cuda.device(device))
        if compiles:  # beyond its limits it would run eagerly
            limits = {"recompile_limit": 10**6, "accumulated_recompile_limit": 10**6}
            stack.enter_context(torch._dynamo.config.patch(limits))
        if freezing:  # code compiled without is not guarded against it; eager calls need the parameters
            torch.compiler.reset()
            stack.callback(torch.compiler.reset)
            stack.enter_context(torch._inductor.config.patch(freezing=True, freezing_discard_parameters=False))
        yield


# ----------------------------------------------------------------------------------------------------------------- checks
def _check(batch_sizes: Any, rounds: Any, min_seconds: Any, dtype: Any, autocast: Any) -> None:
    if not isinstance(batch_sizes, Sequence) or not batch_sizes or not all(map(is_count, batch_sizes)):
        raise SqueezeExciteError(f"batch_sizes={shown(batch_sizes)}: expected integers >= 1, such as (1, 8)")
    if dtype is not None:
        check_floating("dtype", dtype, "None, or ")
    if autocast is not None and not (isinstance(autocast, torch.dtype) and autocast in (torch.bfloat16, torch.float16)):
        raise SqueezeExciteError(f"autocast={shown(autocast)}: expected None, torch.bfloat16 or torch.float16")
    if not is_count(rounds):
        raise SqueezeExciteError(f"rounds={shown(rounds)}: expected an integer >= 1")
    if not is_number(min_seconds) or not 0 <= min_seconds < math.inf:
        raise SqueezeExciteError(f"min_seconds={shown(min_seconds)}: expected seconds, a number >= 0")


def _check_modes(compiled: Any, freezing: Any, training: Any, channels_last: Any) -> None:
    if not (isinstance(compiled, bool) or (isinstance(compiled, str) and compiled == "both")):
        raise SqueezeExciteError(f'compiled={shown(compiled)}: expected False, True or "both"')
    for name, value in (("freezing", freezing), ("training", training), ("channels_last", channels_last)):
        check_flag(name, value)
    if freezing and not compiled:
        raise SqueezeExciteError('freezing=True: freezes weights in compiled code; pass compiled=True or "both"')
    if freezing and training:
        raise SqueezeExciteError("freezing=True: freezes weights, which training changes; pass training=False")


def _named(models: Any, training: bool = False) -> dict[str, nn.Module]:
    if isinstance(models, nn.Module) and plan_of(models) is not None:
        known = {"original": remove(models), "rewritten": models}
        return {**known, "optimized": optimize_for_training(models)} if training else known
    expected = "expected modules by name, the baseline first, or one model that se_fx.transform returned"
    if not isinstance(models, Mapping) or not models:
        raise SqueezeExciteError(f"models={'{}' if isinstance(models, Mapping) else type(models).__name__}: {expected}")
    for name, model in models.items():
        if not isinstance(name, str) or not isinstance(model, nn.Module):
            raise SqueezeExciteError(f"models: {name!r} is of type {type(model).__name__}; {expected}")
    return dict(models)


def _backends(backend: Any, models: Mapping[str, nn.Module], compiles: bool) -> dict[str, str]:
    """The backend of each model."""
    given = dict(backend) if isinstance(backend, Mapping) else dict.fromkeys(models, backend)
    if not compiles and set(map(shown, given.values())) <= {shown("inductor")}:
        return given
    known = torch.compiler.list_backends(exclude_tags=())
    for name, each in given.items():
        if name not in models:
            raise SqueezeExciteError(f"backend: {shown(name)} is not among the models, {list(models)}")
        if not isinstance(each, str) or each not in known:
            raise SqueezeExciteError(
                f"backend={shown(each)}: expected a backend of torch.compile, such as 'inductor', "
                "or a mapping of models' names to backends"
            )
        if not compiles:
            raise SqueezeExciteError(f'backend={shown(each)}: compiles models; pass compiled=True or "both"')
    return {name: given.get(name, "inductor") for name in models}


def _device(models: Mapping[str, nn.Module], device: Any) -> torch.device:
    if device is not None:
        return as_device(device)
    found = {t.device for model in models.values() for t in (*model.parameters(), *model.buffers())}
    if len(found) > 1:
        raise SqueezeExciteError(f"device: the models' tensors are on {', '.join(sorted(map(str, found)))}; pass one of these")
    return as_device(next(iter(found), "cpu"))


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", facts.read_text(), re.MULTILINE) if facts.exists() else None
    return named[1] if named else platform.processor() or platform.machine()
