"""Lightning: a callback that gives the networks of a LightningModule their blocks before training starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

import se_fx

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
    from torchmetrics import Metric, MetricCollection
except ImportError as error:
    raise ImportError("se_fx.integrations.lightning needs Lightning: pip install 'se_fx[lightning]'") from error

__all__ = ["SqueezeExcite"]

_PLAN = "squeeze_excite_plan"  # attribute of a rewritten LightningModule
_COPIERS = {"StochasticWeightAveraging", "WeightAveraging"}


class SqueezeExcite(Callback):
    """Rewrites the networks that a LightningModule holds, as `se_fx.transform` does, when a Trainer sets it up.

    That is before the strategy wraps the module, before optimizers are configured and before a checkpoint is loaded,
    in fit, validate, test and predict alike. Every child of the LightningModule that holds a Conv2d is replaced by a
    rewritten one, metrics apart; the LightningModule itself keeps its class. Sites bear the names that convs have
    in it, such as ``model.layer4.0.conv1``. What is rewritten already, the module or a child, is left as it is.

    Checkpoints say what was inserted. Resuming with other options raises; `restore` rewrites a plain module as a
    checkpoint says, for use without a Trainer.

    Args:
        recompute: optimise the networks for training, as `se_fx.optimize_for_training` does: nothing is kept for blocks.
        **options: those of `se_fx.transform`. Without a `seed`, one is drawn from PyTorch's generator; all ranks use
            that of rank 0, and so insert equal blocks.

    Attributes:
        plan: the blocks inserted in the module that was set up last; None before.

    Raises:
        SqueezeExciteError: when a Trainer sets it up: an option is not what is expected, the module holds no Conv2d
            that qualifies, or a callback before this one has copied the module as it was.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[SqueezeExcite(min_channels=512, init="identity", seed=0)], logger=False)
    """

    def __init__(self, *, recompute: bool = False, **options: Any) -> None:
        if not isinstance(recompute, bool):
            raise se_fx.SqueezeExciteError(f"recompute={recompute!r}: expected True or False")
        self.recompute, self.options = recompute, options
        self.plan: se_fx.Plan | None = None
        self._ungraded: dict[str, nn.Parameter] = {}  # the blocks' parameters that no gradient has reached so far

    def __repr__(self) -> str:
        options = {**({"recompute": True} if self.recompute else {}), **self.options}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in options.items())})"

    def rewrite(self, module: LightningModule) -> None:
        """Insert the blocks into `module` now, before any Trainer does.

        Raises:
            SqueezeExciteError: an option is not what is expected, or the module holds no Conv2d that qualifies.
        """
        self._rewrite(module, self.options)

    @staticmethod
    def restore(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Insert into a plain `module` the blocks that a checkpoint says it was saved with.

        Call it in the module's ``on_load_checkpoint(self, checkpoint)``, and ``load_from_checkpoint`` works; or by
        hand, before ``module.load_state_dict(checkpoint["state_dict"])``. A checkpoint that was saved without this
        callback leaves the module as it is.

        Args:
            module: the LightningModule.
            checkpoint: a checkpoint of Lightning's, as `torch.load` returns it.

        Raises:
            SqueezeExciteError: `checkpoint` is none, the module has other blocks already, or is not the one the checkpoint was
                made with.
        """
        callbacks = checkpoint.get("callbacks", {}) if isinstance(checkpoint, Mapping) else None
        if not isinstance(callbacks, Mapping):
            raise se_fx.SqueezeExciteError("checkpoint: expected a checkpoint of Lightning's, as torch.load returns it")
        state = callbacks.get(SqueezeExcite.__qualname__)
        if state is None:
            return
        own = _plan_of(module)
        if own is not None:
            _check_equal(state["plan"], own)
        else:
            _insert(module, {"plan": se_fx.Plan.from_dict(state["plan"])})

    # -------------------------------------------------------------------------------------------------- Lightning's hooks
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Insert the blocks, and log how many there are."""
        if _plan_of(pl_module) is None:
            self._check(trainer)
            # Callbacks have no hook between configure_model and the strategy's; Lightning asks that it may be called twice.
            with (
                trainer.strategy.tensor_init_context(),
                trainer.strategy.model_sharded_context(),
                trainer.precision_plugin.module_init_context(),
            ):
                pl_module.configure_model()
            seed = self.options.get("seed")
            seed = int(torch.randint(2**31, ())) if seed is None else seed
            self._rewrite(pl_module, {**self.options, "seed": trainer.strategy.broadcast(seed)})
        self.plan = _plan_of(pl_module)
        if stage == "fit":
            for logger in trainer.loggers:
                logger.log_hyperparams({"squeeze_excite/num_squeeze_excite_layers": len(self.plan or ())})

    def state_dict(self) -> dict[str, Any]:
        """The plan, for checkpoints."""
        return {} if self.plan is None else {"plan": self.plan.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare a checkpoint's plan with that of the module.

        Raises:
            SqueezeExciteError: they differ.
        """
        if self.plan is not None:
            _check_equal(state_dict["plan"], self.plan)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to look for blocks that training doesn't reach. On several ranks the strategy does that itself."""
        if trainer.world_size == 1:
            self._ungraded = {name: p for name, p in _block_parameters(pl_module).items() if p.requires_grad}

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note which blocks have been reached."""
        self._ungraded = {name: p for name, p in self._ungraded.items() if p.grad is None}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of those that have not."""
        if self._ungraded:
            rank_zero_warn(
                f"{len(self._ungraded)} parameters of Squeeze-and-Excitation blocks, {next(iter(self._ungraded))!r} first, had "
                "no gradient in this epoch: the module's steps call parts of a child (self.model.layer4(x)), past the graph "
                "that holds its blocks. Call se_fx.apply_squeeze_excite(module) instead of using this callback: its blocks act "
                "whatever code calls a conv"
            )
        self._ungraded = {}

    # ------------------------------------------------------------------------------------------------------------ helpers
    def _check(self, trainer: Trainer) -> None:
        for callback in trainer.callbacks[: trainer.callbacks.index(self)]:
            if _COPIERS & {kind.__name__ for kind in type(callback).__mro__}:  # by name: of either of Lightning's packages
                raise se_fx.SqueezeExciteError(
                    f"callbacks: {type(callback).__name__} copies the module before this callback rewrites it; "
                    f"put SqueezeExcite before {type(callback).__name__}"
                )
        launcher = trainer.strategy.launcher
        if "_MultiProcessingLauncher" in (kind.__name__ for kind in type(launcher).__mro__):
            raise se_fx.SqueezeExciteError(
                "strategy: processes that are spawned or forked rewrite copies of the module, and the trained blocks would be "
                "lost with them; call SqueezeExcite(...).rewrite(module) before trainer.fit(module), or use strategy='ddp'"
            )

    def _rewrite(self, module: LightningModule, options: Mapping[str, Any]) -> None:
        if _plan_of(module) is None:
            rank_zero_info(_insert(module, options))
            if self.recompute:
                _optimize(module)
        self.plan = _plan_of(module)


def _plan_of(module: nn.Module) -> se_fx.Plan | None:
    plan = module.__dict__.get(_PLAN)
    return plan if isinstance(plan, se_fx.Plan) else None


def _insert(module: LightningModule, options: Mapping[str, Any]) -> str:
    """Replace the children of `module` that hold convs by rewritten ones; the report of that."""
    kind = type(module).__name__
    children = type(kind, (_Children if _needs_graphs(options) else nn.Module,), {})()  # errors name the LightningModule
    in_place = rewritten_before = _is_rewritten(module)  # by apply_squeeze_excite
    for name, child in module._modules.items():
        if in_place or _is_rewritten(child):
            rewritten_before = True
            continue
        parts = () if isinstance(child, (Metric, MetricCollection, type(None))) else child.modules()
        if any(isinstance(part, nn.Conv2d) for part in parts):
            children.add_module(name, child)
    if not children._modules and rewritten_before:
        module.__dict__[_PLAN] = se_fx.Plan(())
        return f"{kind}: its networks are rewritten already; no block was inserted."
    if not children._modules:
        raise se_fx.SqueezeExciteError(
            f"module: {kind} holds no Conv2d; build its networks in __init__ or in configure_model, or, "
            "where its own setup builds them, call se_fx.transform there, instead of using this callback"
        )
    children.networks = tuple(children._modules)
    rewritten = se_fx.transform(children, **options)
    plan = se_fx.Plan.of(rewritten)
    if not plan.sites and "plan" not in options:
        first = f"{plan.skipped[0].name}: {plan.skipped[0].reason}"
        raise se_fx.SqueezeExciteError(f"module: no Conv2d of {kind} qualifies for a block ({first}); change the options")
    for name, child in rewritten._modules.items():  # all names of a child that has several
        module.add_module(name, child)
    module.__dict__[_PLAN] = plan
    module.register_load_state_dict_pre_hook(_check_shapes)
    report = dataclasses.replace(se_fx.report(rewritten), model=kind)
    return str(dataclasses.replace(report, opaque=report.opaque[1:]))  # the first is `children` itself


def _optimize(module: LightningModule) -> None:
    """Have the children of `module` with blocks keep nothing for these."""
    for name, child in [*module._modules.items()]:
        parts = () if isinstance(child, (Metric, MetricCollection, type(None))) else child.modules()
        if child is not None and any(isinstance(part, nn.Conv2d) for part in parts):
            module.add_module(name, se_fx.optimize_for_training(child))


def _is_rewritten(child: Any) -> bool:
    try:
        se_fx.Plan.of(child)
    except se_fx.SqueezeExciteError:
        return False
    return True


class _Children(nn.Module):
    """Several networks as one model, so that what they share stays shared, its blocks too.

    Tracing it shows that each is called, and then that they are called by code that is no graph. A Sequential that isn't
    seen to be called would be captured conv by conv, since its owner might iterate it.
    """

    networks: tuple[str, ...] = ()  # their names, since blocks are kept away from code that asks what its children are

    def forward(self, x: Tensor) -> None:
        for name in self.networks:
            getattr(self, name)(x)
        raise NotImplementedError("the LightningModule's own code calls them")


def _needs_graphs(options: Mapping[str, Any]) -> bool:
    """Whether places are found in graphs: directly after a conv is where the conv is, whatever calls it."""
    plan = options.get("plan")
    placements = [options.get("placement", "conv")] if plan is None else [site.placement for site in getattr(plan, "sites", ())]
    return any(placement != "conv" for placement in placements)


def _block_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if "squeeze_excite" in name.split(".")}


def _block_shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    tensors = {
        name: value for name, value in state.items() if isinstance(value, Tensor) and "squeeze_excite" in name.split(".")
    }
    # Of a block's extra state, the block itself says what is wrong.
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith("._extra_state")}


def _check_equal(saved: Mapping[str, Any], own: se_fx.Plan) -> None:
    """Plans are compared as saved: functions of the caller's, which they name, need not be in any table."""
    try:
        before, now = ({site["name"]: site for site in plan["sites"]} for plan in (saved, own.to_dict()))
    except (KeyError, TypeError) as error:
        raise se_fx.SqueezeExciteError("checkpoint: the plan in it is none; was it saved with SqueezeExcite?") from error
    for name in {**before, **now}:
        was, is_now = before.get(name, {}), now.get(name, {})
        if was != is_now:
            kept, asked = ({k: v for k, v in a.items() if b.get(k) != v} or "none" for a, b in ((was, is_now), (is_now, was)))
            raise se_fx.SqueezeExciteError(
                f"checkpoint: it was saved with other blocks than this module has; at {name!r} it has {kept}, the module "
                f"{asked}. Give SqueezeExcite the options that were used then"
            )


def _check_shapes(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before a load, strict or not: that blocks are the same. Lightning compares plans only after it has loaded weights."""
    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        return  # whose parameters have other shapes
    own, given = _block_shapes(module.state_dict(prefix=prefix)), _block_shapes(state_dict)
    for name in {**given, **own} if given else ():
        if given.get(name) != own.get(name):
            there, here = given.get(name, "no such parameter"), own.get(name, "none")
            raise se_fx.SqueezeExciteError(
                f"state_dict: its Squeeze-and-Excitation blocks are not those of the module; {name} has "
                f"{there} there, and {here} in the module. Give SqueezeExcite the options that were used then"
            )
