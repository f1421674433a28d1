"""Surgery: what people and tools do to the modules around blocks: followed where the blocks can go on, else refused."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from se_fx.errors import SqueezeExciteError

__all__ = ["inherited", "refuse_surgery"]


def refuse_surgery(module: Any) -> None:
    """Raise where somebody has folded a norm into a convolution across a block that stands between them, or deleted a block.

    Raises:
        SqueezeExciteError: names the module, and what to do instead.
    """
    for name, child in module.__dict__.get("_holding", {}).items():
        lost = "" if module._modules.get(name) is child else _lost(module, name, child)
        if "_excited_by" in child.__dict__ and not hasattr(type(child), "_own_class"):
            lost = "given another class"
        if lost:
            raise SqueezeExciteError(
                f"{module._own_class.__name__}: {name} was {lost}, and with it Squeeze-and-Excitation blocks that stand "
                "there, as happens where convolutions and norms are folded. Use a placement outside of what is folded, such as "
                'placement="activation" or "residual"; or se_fx.remove() the blocks first, or exchange modules before'
            )
    for conv_name, norm_name, had_bias, kind in module.__dict__.get("_between", ()):
        conv, norm = _child(module, conv_name), _child(module, norm_name)
        gained = conv is not None and not had_bias and conv._parameters.get("bias") is not None
        if norm is None or gained or (type(norm) is not kind and "norm" not in type(norm).__name__.lower()):
            raise SqueezeExciteError(
                f"{norm_name} was folded into {conv_name}, or replaced, and a Squeeze-and-Excitation block stands between: "
                'outputs would be wrong. Use placement="activation" or "residual", outside of what is folded; or, instead of '
                'fusing, se_fx.optimize_for_inference, which folds around blocks, and best with placement="norm"'
            )


def _lost(module: Any, name: str, child: nn.Module) -> str:
    """What has become of a child with blocks, in words; empty where they are still there, or were taken out on purpose."""
    other = module._modules.get(name)
    if isinstance(module, nn.Sequential):
        modules = module._modules.values()
        if any(each is child for each in modules) or len(modules) < module.__dict__["_length"]:
            return ""  # it has been made shorter
    if other is None:
        return "deleted"
    inner = list(other.modules())
    if any(each is child or "_holding" in each.__dict__ or "_excited_by" in each.__dict__ for each in inner):
        return ""  # wrapped, or made from it
    is_leaf = not child._modules
    return "replaced" if is_leaf or any(isinstance(each, nn.Conv2d) for each in inner) else ""


def inherited(module: Any, name: str, new: Any) -> list[Any] | None:
    """The blocks of what stands under a name, if what replaces it is to scale what it returns as well.

    It is another of its kind, as norms are exchanged for synchronised ones, or convolutions for standardised ones; or something
    around it, as an adapter is, or that which was within.
    """
    old = module.__dict__.get("_holding", {}).get(name)
    if not isinstance(new, nn.Module) or old is None or old is new or module._modules.get(name) is not old:
        return None
    blocks: list[Any] | None = old.__dict__.get("_excited_by")
    if not blocks or "_excited_by" in new.__dict__ or isinstance(new, fx.GraphModule):
        return None
    is_leaf = not old._modules and not new._modules
    return blocks if (is_leaf and _alike(old, new)) or old in set(new.modules()) or new in set(old.modules()) else None


def _alike(old: Any, new: Any) -> bool:
    if isinstance(old, nn.Conv2d):
        return isinstance(new, nn.Conv2d) and old.out_channels == new.out_channels
    return all("norm" in type(each).__name__.lower() for each in (old, new))


def _child(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = module._modules.get(part) if module is not None else None
    return module
