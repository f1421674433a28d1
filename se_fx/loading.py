"""Loading: models by name, for the command line."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from se_fx.errors import SqueezeExciteError, blaming

__all__ = ["load_model"]


def load_model(spec: str, *, meta: bool = True) -> nn.Module:
    """The model that `spec` names: a torchvision name, timm:NAME, or package.module:callable.

    A module is imported and its callable called: that runs their code. The current folder is looked in first.

    Args:
        spec: the name.
        meta: build models of the zoos on the meta device, where they take no memory and have no weights.

    Raises:
        SqueezeExciteError: there is none, or the package that has it is not installed.
    """
    source, _, name = spec.rpartition(":")
    if source and source != "timm":
        return _from_module(source, name, spec)
    if source:
        timm = _import("timm", spec)
        known, build = timm.list_models(), lambda: timm.create_model(name, pretrained=False)
    else:
        models = _import("torchvision", spec).models
        known, build = models.list_models(), lambda: _from_torchvision(name, models)
    _check_name(name, known)
    return _on_meta(build) if meta else build()  # type: ignore[no-untyped-call]


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
    expected = "expected a torchvision model, timm:NAME or package.module:callable"
    hint = f"did you mean {' or '.join(close)}?" if close else expected
    raise SqueezeExciteError(f"MODEL {name!r}: there is no such model; {hint}")


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, NotImplementedError):  # some read values while they build themselves
        return build()


def _from_module(source: str, name: str, spec: str) -> nn.Module:
    sys.path.insert(0, "")
    try:
        with blaming(f"MODEL {spec!r}: can't import {source!r}"):
            module = importlib.import_module(source)
    finally:
        sys.path.remove("")
    factory = getattr(module, name, None)
    if factory is None:
        raise SqueezeExciteError(f"MODEL {spec!r}: {source} has no {name!r}; expected package.module:callable")
    with blaming(f"MODEL {spec!r}: calling it failed"):
        model = factory if isinstance(factory, nn.Module) else factory()
    if not isinstance(model, nn.Module):
        raise SqueezeExciteError(f"MODEL {spec!r}: expected it to return an nn.Module, and got {type(model).__name__}")
    return model
