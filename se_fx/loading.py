"""Loading: models and other objects by name, for the command line."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from se_fx.errors import SqueezeExciteError, blaming

__all__ = ["load_model", "load_object"]


def load_model(spec: str, *, meta: bool = True, trust_pickle: bool = False) -> nn.Module:
    """The model that `spec` names: a torchvision name, timm:NAME, package.module:callable or path/to/file.py:callable.

    A module is imported and its callable called: that runs their code. The current folder is looked in first.

    Args:
        spec: the name.
        meta: build models of the zoos on the meta device, where they take no memory and have no weights.
        trust_pickle: `spec` may be a file, ``.pt`` or ``.pth``, that `torch.save` wrote a whole model to; to load it runs
            whatever code it holds.

    Raises:
        SqueezeExciteError: there is none, or the package that has it is not installed.
    """
    if spec.endswith((".pt", ".pth", ".pt2")):
        return _from_pickle(spec, trust_pickle)
    source, _, name = spec.rpartition(":")
    if source and source != "timm":
        return _from_callable(spec)
    if source:
        timm = _import("timm", spec)
        known, build = timm.list_models(), lambda: timm.create_model(name, pretrained=False)
    else:
        models = _import("torchvision", spec).models
        known, build = models.list_models(), lambda: _from_torchvision(name, models)
    _check_name(name, known)
    return _on_meta(build) if meta else build()  # type: ignore[no-untyped-call]


def load_object(spec: str, argument: str) -> Any:
    """What package.module:name or path/to/file.py:name names. The module, or the file, is run.

    Args:
        spec: the name.
        argument: what messages call it.

    Raises:
        SqueezeExciteError: there is none.
    """
    source, colon, name = spec.rpartition(":")
    if not colon:
        raise SqueezeExciteError(f"{argument} {spec!r}: expected package.module:name or path/to/file.py:name")
    with blaming(f"{argument} {spec!r}: can't import {source!r}"):
        module = _from_file(source) if source.endswith(".py") else _from_package(source)
    found = getattr(module, name, None)
    if found is None:
        raise SqueezeExciteError(f"{argument} {spec!r}: {source} has no {name!r}; expected package.module:name")
    return found


def _from_package(source: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(source)
    finally:
        sys.path.remove("")


def _from_file(source: str) -> ModuleType:
    """A file, run once, as a module of its name; what it imports is looked for beside it first."""
    path = Path(source).resolve()
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.path.insert(0, str(path.parent))
    try:
        found.loader.exec_module(module)
        sys.modules.setdefault(path.stem, module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _from_callable(spec: str) -> nn.Module:
    factory = load_object(spec, "MODEL")
    with blaming(f"MODEL {spec!r}: calling it failed"):
        model = factory if isinstance(factory, nn.Module) else factory()
    return _checked(model, spec, "it to return")


def _from_pickle(path: str, trusted: bool) -> nn.Module:
    if path.endswith(".pt2"):
        raise SqueezeExciteError(
            f"MODEL {path!r}: a program of torch.export has operators, and no nn.Conv2d that a block could follow; "
            "give the MODEL that it was exported from"
        )
    if not trusted:
        raise SqueezeExciteError(
            f"MODEL {path!r}: a file that holds a model is code, which may do anything when it is loaded; if you trust it, say "
            "--trust-pickle; else give the code's MODEL, and the file's state_dict as --checkpoint"
        )
    with open(path, "rb") as file, blaming(f"MODEL {path!r}: can't be loaded"):
        model = torch.load(file, map_location="cpu", weights_only=False)
    return _checked(model, path, "the file to hold")


def _checked(model: Any, spec: str, holds: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise SqueezeExciteError(f"MODEL {spec!r}: expected {holds} an nn.Module, and got {type(model).__name__}")
    return model


def _from_torchvision(name: str, models: Any) -> nn.Module:
    weights = {"weights": None}
    if "weights_backbone" in getattr(models.get_model_builder(name), "__annotations__", {}):
        weights["weights_backbone"] = None
    return models.get_model(name, **weights)  # type: ignore[no-any-return]


def _import(package: str, spec: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SqueezeExciteError(f"MODEL {spec!r}: {package} can't be imported ({error}); pip install {package}") from error


def _check_name(name: str, known: Sequence[str]) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=3)
    expected = "expected a torchvision model, timm:NAME, package.module:callable or file.py:callable"
    hint = f"did you mean {' or '.join(close)}?" if close else expected
    raise SqueezeExciteError(f"MODEL {name!r}: there is no such model; {hint}")


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, NotImplementedError):  # some read values while they build themselves
        return build()
