"""Sharing: the blocks of a rewritten model in a file of their own, apart from the network that they were trained on."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import secrets
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from se_fx.arguments import as_path
from se_fx.capture import check_plain, check_whole, kept_on_failure
from se_fx.errors import SqueezeExciteError, shown
from se_fx.insertion import block_names, undone_on_failure
from se_fx.measure import blocks_of
from se_fx.planning import Plan
from se_fx.transform import apply_squeeze_excite

__all__ = ["load_blocks", "save_blocks"]

_METADATA = "se_fx.blocks"  # its key in the file
_VERSION = 1
MOST_HEADER_BYTES = 2**24  # names and shapes; some thousand blocks take one of these 16 MiB
MOST_EXTRA_STATE = 2**16  # numbers; what a block has to say beside its weights is some dozens


def save_blocks(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the blocks of a rewritten model, without the model, to a safetensors file.

    It holds the blocks' parameters, buffers and extra state, under their keys in the model's `state_dict`, and the plan. It is
    written beside and renamed: a file that was there before is whole until the new one is.

    Args:
        model: what `transform` returned, or what `apply_squeeze_excite` was given.
        path: the file, by custom with the ending ".safetensors".

    Raises:
        SqueezeExciteError: the model isn't a rewritten one, or is sharded; its plan has own functions that aren't in the public
            tables, so that nobody could load them; a block holds something else than tensors with values; the file can't
            be written; or safetensors isn't installed.

    >>> import se_fx, tempfile
    >>> net, twin = (nn.Sequential(nn.Conv2d(3, 256, 3)) for _ in range(2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_blocks(se_fx.transform(net), f"{folder}/gates.safetensors")
    ...     load_blocks(twin, f"{folder}/gates.safetensors")
    >>> list(se_fx.blocks_of(twin))
    ['0']
    """
    library, file = _safetensors(), as_path("path", path)
    plan, blocks, names = Plan.of(model), _blocks(model), block_names(model)
    with _refusing("model: its blocks could not be loaded again"):
        Plan.from_dict(plan.to_dict())
    header = json.dumps({"version": _VERSION, "plan": plan.to_dict(), "blocks": names})
    with _refusing("model: its blocks can't be saved"):
        tensors = {
            f"{names[site]}.{key}": _plain(site, key, value)
            for site, block in blocks.items()
            for key, value in block.state_dict().items()
        }
        content = library.torch.save(tensors, {_METADATA: header})
    _check_header(file, content[:8])
    with _refusing(f"{_named(file)}: can't be written"):
        _replace(file, content)


def load_blocks(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Put the blocks that `save_blocks` wrote into a model, in place.

    A model without blocks gets them, as by `apply_squeeze_excite`. A model with blocks of the same plan gets their values
    alone: nothing is traced, Parameter objects stay the same, and optimizers and compiled code go on. Devices and dtypes
    are the model's: floating-point values are cast as `load_state_dict` casts them. Nothing in a file is imported or run.

    Args:
        model: the network that the blocks were trained on, or one of the same architecture; rewritten by the same plan, or not
            at all.
        path: the file.

    Raises:
        SqueezeExciteError: there is no such file, or it is none of `save_blocks`, damaged or of a later version; the blocks
            don't fit the model; this has other blocks, or is wrapped, sharded or without values; or safetensors isn't
            installed. Then nothing has been changed.
    """
    _safetensors()
    file = as_path("path", path)
    own = _plan_before(model)
    saved = _read(file)
    if own is not None:
        _check_same(file, saved.plan, own)
        _take_values(file, saved, _blocks(model))
        return
    with kept_on_failure(model), undone_on_failure(model):
        with _refusing(_named(file)):
            apply_squeeze_excite(model, plan=saved.plan, seed=0)  # the values are replaced, and nobody's generator has moved
        _take_values(file, saved, _blocks(model))


# ----------------------------------------------------------------------------------------------------------------- models
def _plan_before(model: nn.Module) -> Plan | None:
    """The plan of the blocks that a model has; None where it has none, and can be given some.

    Raises:
        SqueezeExciteError: it can't, or a part of it has blocks.
    """
    if isinstance(model, nn.Module) and block_names(model):
        return Plan.of(model)
    check_plain(model)
    return None


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a rewritten model, by the names of the sites of its plan.

    Raises:
        SqueezeExciteError: it is sharded, or not as it was rewritten.
    """
    check_whole(model)
    names, sites = block_names(model), {site.name for site in Plan.of(model).sites}
    modules = dict(model.named_modules(remove_duplicate=False))
    lost = sorted((names.keys() ^ sites) | {site for site, name in names.items() if name not in modules})
    if lost:
        raise SqueezeExciteError(
            f"model: its plan and its blocks differ at site {shown(lost[0])}, since a part was replaced, or rewritten by "
            "itself; rewrite the whole model again"
        )
    return blocks_of(model)


def _check_same(file: Path, saved: Plan, own: Plan) -> None:
    """Refuse a model whose optimizers, or graphs, would be left with parameters of blocks that it has no more."""
    theirs, ours = ({site["name"]: site for site in plan.to_dict()["sites"]} for plan in (saved, own))
    for name in {**theirs, **ours}:
        there, here = theirs.get(name), ours.get(name)
        if there == here:
            continue
        if there is None or here is None:
            differ = f"the {'file' if here is None else 'model'} alone has a block at site {shown(name)}"
        else:
            key = next(key for key in there if there[key] != here[key])
            differ = f"at site {shown(name)} the file has {key}={shown(there[key])}, the model {shown(here[key])}"
        raise SqueezeExciteError(
            f"{_named(file)}: the model has other blocks: {differ}; call se_fx.remove first, and load into what it returns"
        )


def _take_values(file: Path, saved: _Saved, blocks: Mapping[str, nn.Module]) -> None:
    """Have blocks take over what a file has for them; where one can't, all have what they had."""
    states = _states(file, saved, blocks)
    before = {site: copy.deepcopy(block.state_dict()) for site, block in blocks.items()}
    try:
        for site, block in blocks.items():
            with _refusing(f"{_named(file)}: site {shown(site)} does not fit"):
                block.load_state_dict(states[site])
    except BaseException:  # an interrupt, too
        for site, block in blocks.items():
            block.load_state_dict(before[site])
        raise


def _states(file: Path, saved: _Saved, blocks: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """What a file has for each block, checked against what that holds now.

    Raises:
        SqueezeExciteError: a tensor is missing, unknown, of another shape, or of values that the block can't hold.
    """
    states: dict[str, dict[str, Any]] = {}
    used = set()
    for site, block in blocks.items():
        state = states[site] = block.state_dict()  # with the versions of its modules
        for key, own in state.items():
            name = f"{saved.names[site]}.{key}"
            used.add(name)
            fault = _misfit(key, saved.tensors.get(name), own)
            if fault:
                raise SqueezeExciteError(f"{_named(file)}: site {shown(site)} does not fit: {key} {fault}")
            state[key] = saved.tensors[name].clone()
    unknown = sorted(saved.tensors.keys() - used)
    if unknown:
        raise SqueezeExciteError(f"{_named(file)}: the tensor {shown(unknown[0])} is of no block of the model")
    return states


def _misfit(key: str, saved: Tensor | None, own: Any) -> str | None:
    """Why a saved tensor can't become a value of a block's; None where it can."""
    if saved is None:
        return "isn't in the file"
    if key.rpartition(".")[2] == "_extra_state":  # the block itself reads it
        return f"has {saved.numel():,} numbers in the file" if saved.numel() > MOST_EXTRA_STATE else None
    if own.is_meta:
        return "is on the meta device in the model, without values: give the model values first, as by to_empty"
    if saved.shape != own.shape:
        return f"is of shape {tuple(saved.shape)} in the file and {tuple(own.shape)} in the model"
    if saved.dtype == own.dtype:
        return None
    dtypes = f"is of {saved.dtype} in the file and of {own.dtype} in the model"
    if not (saved.is_floating_point() and own.is_floating_point()):
        return f"{dtypes}, which are cast only where both are floating-point"
    if not torch.equal(saved.double().isfinite(), saved.to(own.dtype).double().isfinite()):
        return f"{dtypes}, which has not the range for its values"
    return None


# ------------------------------------------------------------------------------------------------------------------ files
@dataclass(frozen=True)
class _Saved:
    """What a file holds.

    Attributes:
        plan: the sites.
        names: the blocks' names in the model that they are from, by their sites'.
        tensors: by their keys in that model, in the memory of the file.
    """

    plan: Plan
    names: Mapping[str, str]
    tensors: Mapping[str, Tensor]


def _read(file: Path) -> _Saved:
    """A file's content. Nothing is known of its tensors yet but that the file has all of them.

    Raises:
        SqueezeExciteError: it can't be read, is none of `save_blocks`, or out of bounds.
    """
    library = _safetensors()
    with _refusing(f"{_named(file)}: can't be read"), file.open("rb") as stream:
        start = stream.read(8)
    _check_header(file, start)
    with (
        _refusing(f"{_named(file)}: expected a whole file that se_fx.save_blocks wrote"),
        torch.device("cpu"),  # whatever the default device, where older versions of safetensors make tensors
        library.safe_open(str(file), framework="pt") as opened,
    ):
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    plan, names = _described(file, metadata.get(_METADATA))
    return _Saved(plan, names, tensors)


def _check_header(file: Path, start: bytes) -> None:
    size = int.from_bytes(start, "little")
    if size > MOST_HEADER_BYTES:
        raise SqueezeExciteError(
            f"{_named(file)}: expected a file of se_fx.save_blocks, with a header of at most {MOST_HEADER_BYTES:,} bytes, and "
            f"got {size:,}"
        )


def _described(file: Path, text: str | None) -> tuple[Plan, dict[str, str]]:
    """The plan and the blocks' names that a file's metadata have."""
    try:
        data = json.loads(text or "null")
    except (ValueError, RecursionError):
        data = None
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is not int or version != _VERSION:
        raise SqueezeExciteError(
            f"{_named(file)}: expected a file that se_fx.save_blocks wrote, of version {_VERSION}, and got version "
            f"{shown(version)}; upgrade se_fx if a later one has saved it"
        )
    if set(data) != {"version", "plan", "blocks"}:
        raise SqueezeExciteError(f"{_named(file)}: expected the keys version, plan and blocks alone; got {shown(list(data))}")
    with _refusing(_named(file)):
        plan = Plan.from_dict(data["plan"])
    names = data["blocks"]
    sites = {site.name for site in plan.sites}
    if not isinstance(names, dict) or names.keys() != sites or not all(isinstance(name, str) for name in names.values()):
        raise SqueezeExciteError(f"{_named(file)}: blocks={shown(names)}: expected a name for each site of the plan")
    return plan, names


def _plain(site: str, key: str, value: Any) -> Tensor:
    """A tensor that a file can hold, in memory of its own."""
    if type(value) is not Tensor or value.is_meta:
        kind = "tensor on the meta device" if isinstance(value, Tensor) and value.is_meta else type(value).__name__
        raise SqueezeExciteError(f"{key} at site {shown(site)} is a {kind}; expected plain tensors with values alone")
    return value.detach().cpu().contiguous().clone()


def _replace(file: Path, content: bytes) -> None:
    """Write a file, so that at no time there is a part of it alone."""
    file = file.resolve()
    beside = file.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        beside.write_bytes(content)
        beside.replace(file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise SqueezeExciteError("safetensors reads and writes blocks; pip install 'se_fx[safetensors]'") from error
    return safetensors


# ----------------------------------------------------------------------------------------------------------------- errors
def _named(file: Path) -> str:
    return f"path={shown(str(file))}"


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Within, whatever is raised says what it is about."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, SqueezeExciteError) else f"{type(error).__name__}: "
        raise SqueezeExciteError(f"{what}: {kind}{textwrap.shorten(str(error), 400)}") from error
