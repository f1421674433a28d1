"""The pipeline, end to end: capture, plan, insert, report; and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from se_fx.capture import capture, check_seed, check_whole, collector_paused, drawing_from, kept_on_failure
from se_fx.cost import Measurement, activation_bytes
from se_fx.criteria import Stages, Where
from se_fx.insertion import Joining, as_optimizers, block_names, insert, insert_in_place, undone_on_failure, withdraw
from se_fx.optimize import optimize_for_training
from se_fx.placement import Policy
from se_fx.planning import (
    BlockFactory,
    Function,
    Options,
    Overrides,
    Plan,
    check_alone,
    choose,
    costed,
    excerpt_of,
    fit,
    give_plan,
    take_plans,
)
from se_fx.regions import clone, graphs_of, own_class
from se_fx.report import Report
from se_fx.rewrites import Optimization, optimization_of

__all__ = ["apply_squeeze_excite", "plan", "remove", "report", "transform"]


def transform(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    example_inputs: Any = None,
    min_channels: int | str = 128,
    latent_channels: float = 64,
    placement: str | Policy = "conv",
    init: str = "default",
    bias: bool = False,
    activation: str | Function = "relu",
    gate: str | Function = "sigmoid",
    block: str | BlockFactory | None = None,
    where: Where = None,
    stages: Stages = None,
    necks: bool | None = None,
    overrides: Overrides = None,
    seed: int | None = None,
    **criteria: Any,
) -> nn.Module:
    """A copy of `model` with Squeeze-and-Excitation blocks after its Conv2d layers.

    The copy shares the model's parameters and buffers; the model itself is left as it is. It is an
    `torch.fx.GraphModule` where the whole model can be traced, else of the model's own class with graphs inside. New
    parameters are on the device and of the dtype of the conv before them, under keys with a component
    ``squeeze_excite``.

    Args:
        model: any module with `nn.Conv2d` layers, not yet compiled, scripted or wrapped for distribution.
        plan: sites chosen before, to be used instead of all options below.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; they make the plan that the
            result carries show spatial sizes and costs. Nothing is computed on them, unless the model's code needs values.
        min_channels: a Conv2d gets a block where it has at least as many *output* channels; "auto" means 512, or
            the largest count there is, if that is less.
        latent_channels: hidden width of the blocks (int >= 1), or a fraction in (0, 1) of the channels; at most four times
            these, or 1024 where that is more.
        placement: where a block goes: directly after the conv ("conv"); after the norm that follows it ("norm"); after
            the activation behind these ("activation": EfficientNet's); at the end of each residual branch ("residual": the
            paper's SE); before the branch ("pre"), on the shortcut ("identity"), after the sum and its activation ("post"): the
            paper's variants; or a policy of your own, as in `se_fx.placement`.
        init: "default", or "identity": gates are exactly 1.0 until training moves them, so outputs stay bitwise equal.
        bias: whether the blocks' linear layers have biases.
        activation: the blocks' hidden activation, "relu", "silu" or "gelu", or a function of a tensor (a module too).
        gate: the blocks' gate function, "sigmoid" or "hardsigmoid", or a function of a tensor (a module too).
        block: a factory ``channels -> nn.Module`` of other attention blocks, (N, C, H, W) to the same shape, instead of
            se_fx's own.
        where: which convs: a predicate ``(name, module) -> bool``, or glob patterns of qualified names, those that
            begin with "!" excluding.
        stages: which stages of the network: "last", a number (0 is the first, -1 the last), the name of a module that holds
            one, such as "layer4", or a list of these. Numbers count the resolutions of maps in the trunk, without necks.
        necks: True for convs of necks and decoders alone (feature pyramids, U-Nets' way up, heads that merge enlarged maps),
            False for all others. Both are found by how data flows; `docs/plans.md` says how.
        overrides: other `latent_channels`, `init`, `bias`, `activation`, `gate` or `block` for some sites, by glob pattern of
            their names, such as ``{"layer4.*": {"latent_channels": 128}}``; later ones win.
        seed: draw the blocks' initial weights from this seed, and leave the global generators as they were: the same
            weights on every rank of a distributed job, whatever their own seeds and devices, with no communication. None
            draws from the global generators.
        **criteria: values of criteria of your own, which you added to `se_fx.criteria.CRITERIA`. Any other name is misspelt,
            and the error says so.

    Raises:
        SqueezeExciteError: an argument is not what is expected, or the plan does not fit the model.

    Source: Hu, Shen, Sun, *Squeeze-and-Excitation Networks*, arXiv 1709.01507.

    >>> net = nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU())
    >>> [key for key in transform(net).state_dict() if key not in net.state_dict()]
    ['squeeze_excite.of_0._extra_state', 'squeeze_excite.of_0.fc1.weight', 'squeeze_excite.of_0.fc2.weight']
    """
    options = Options.given(
        min_channels=min_channels,
        latent_channels=latent_channels,
        placement=placement,
        init=init,
        bias=bias,
        activation=activation,
        gate=gate,
        block=block,
        where=where,
        stages=stages,
        necks=necks,
        overrides=overrides,
        **criteria,
    )
    check_alone(plan, options)
    check_seed(seed)
    with collector_paused():
        captured = capture(model)
        choice = choose(captured, options) if plan is None else fit(captured, plan)
        with kept_on_failure(model):
            with drawing_from(seed) as made_on:
                insertions = choice.insertions(made_on)
            rewritten = insert(captured, insertions)
            give_plan(rewritten, choice.after)
            if example_inputs is not None:
                give_plan(rewritten, costed(rewritten, example_inputs)[0])
    return rewritten


def plan(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    min_channels: int | str = 128,
    latent_channels: float = 64,
    placement: str | Policy = "conv",
    init: str = "default",
    bias: bool = False,
    activation: str | Function = "relu",
    gate: str | Function = "sigmoid",
    block: str | BlockFactory | None = None,
    where: Where = None,
    stages: Stages = None,
    necks: bool | None = None,
    overrides: Overrides = None,
    **criteria: Any,
) -> Plan:
    """What `transform` would do, with nothing changed. Takes the same options.

    With `example_inputs`, every site shows its spatial size and cost; nothing is computed for that.

    >>> import torch
    >>> print(plan(nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU()), example_inputs=torch.zeros(1, 3, 8, 8)))
    1 site, 0 Conv2d layers skipped
    conv      channels    hidden    spatial    parameters    MACs    of model
    ------  ----------  --------  ---------  ------------  ------  ----------
    0              256        64        6x6        32,768  32,768    13.169 %
    """
    options = Options.given(
        min_channels=min_channels,
        latent_channels=latent_channels,
        placement=placement,
        init=init,
        bias=bias,
        activation=activation,
        gate=gate,
        block=block,
        where=where,
        stages=stages,
        necks=necks,
        overrides=overrides,
        **criteria,
    )
    captured = capture(model)
    choice = choose(captured, options)
    if example_inputs is None:
        return choice.plan
    with drawing_from(0) as made_on:  # with values: the model's code may branch on what the blocks return
        insertions = choice.insertions(made_on)
    trial = insert(captured, insertions)
    give_plan(trial, choice.plan)
    return costed(trial, example_inputs)[0]


def report(rewritten: nn.Module, example_inputs: Any = None) -> Report | Optimization:
    """What inserting blocks, or optimising for inference or training, did to a model, and what that costs or saves.

    Args:
        rewritten: what `transform`, `optimize_for_inference` or `optimize_for_training` returned, what `apply_squeeze_excite`
            was given, or a copy of these.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With them, MACs, FLOPs, bytes and
            spatial sizes are counted on fake tensors; without, parameters alone. An optimised model's savings were counted
            when it was made.

    Raises:
        SqueezeExciteError: the model isn't a rewritten one, or can't be called with `example_inputs`.
    """
    for purpose in ("inference", "training") if isinstance(rewritten, nn.Module) else ():
        if (optimization := optimization_of(rewritten, purpose)) is not None:
            return optimization
    known, everything, kept, least = Plan.of(rewritten), Measurement(), None, None
    if example_inputs is not None:
        check_whole(rewritten)
        known, everything = costed(rewritten, example_inputs)
        before, after = (activation_bytes(model, example_inputs) for model in (remove(rewritten), rewritten))
        kept = None if before is None or after is None else (before, after)
        least = None if kept is None else activation_bytes(optimize_for_training(rewritten), example_inputs)
    return Report(
        model=own_class(rewritten).__name__,
        sites=known.sites,
        skipped=known.skipped,
        base=known.base,
        added=known.added,
        measured=known.measured,
        opaque=known.opaque,
        alone=known.alone,
        regions=tuple(name for name, module in rewritten.named_modules() if graphs_of(module) is not None),
        uncounted=tuple(everything.uncounted.most_common()),
        activation_bytes=kept,
        activation_bytes_optimized=least,
        excerpt=() if example_inputs is None else excerpt_of(rewritten),
        operators=tuple(everything.operators),
    )


def remove(rewritten: nn.Module) -> nn.Module:
    """The original back: a copy of `rewritten` without blocks, of the original class, with the same keys and tensors.

    Raises:
        SqueezeExciteError: the model isn't a rewritten one, or is sharded since.

    >>> net = nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU())
    >>> print(remove(transform(net)))
    Sequential(
      (0): Conv2d(3, 256, kernel_size=(3, 3), stride=(1, 1))
      (1): ReLU()
    )
    """
    Plan.of(rewritten)
    check_whole(rewritten)
    model = clone(rewritten)
    for module in list(model.modules()):
        withdraw(module)
    take_plans(model)
    return model


def apply_squeeze_excite(
    model: nn.Module,
    latent_channels: float = 64,
    min_channels: int | str = 128,
    optimizers: Optimizer | Iterable[Optimizer] | None = None,
    *,
    plan: Plan | None = None,
    placement: str | Policy = "conv",
    init: str = "default",
    bias: bool = False,
    activation: str | Function = "relu",
    gate: str | Function = "sigmoid",
    block: str | BlockFactory | None = None,
    where: Where = None,
    stages: Stages = None,
    necks: bool | None = None,
    overrides: Overrides = None,
    seed: int | None = None,
    **criteria: Any,
) -> None:
    """Put Squeeze-and-Excitation blocks into `model`, in place: all that `transform` can do, in the user's own model.

    The model keeps its class, methods, hooks, attributes, submodules and Parameter objects, and goes on running its own code. A
    block stands in the module whose code receives the value it scales, under the same key as in what `transform` returns: a
    checkpoint of one loads into the other. `se_fx.remove` gives a copy without. A second call adds nothing.

    Args:
        model: any module with `nn.Conv2d` layers, not yet compiled, scripted or wrapped for distribution.
        latent_channels: hidden width of the blocks (int >= 1), or a fraction in (0, 1) of the channels.
        min_channels: a Conv2d gets a block where it has at least as many *output* channels, or "auto".
        optimizers: one or several; a block's parameters join the parameter group that holds its conv's, or, where
            none does (a frozen conv), the first group of the first optimizer. State gathered so far is kept.
        plan: sites chosen before, to be used instead of all other options.
        placement: as for `transform`, and so are all others.
        init: as for `transform`.
        bias: as for `transform`.
        activation: as for `transform`.
        gate: as for `transform`.
        block: as for `transform`.
        where: as for `transform`.
        stages: as for `transform`.
        necks: as for `transform`.
        overrides: as for `transform`.
        seed: draw the blocks' initial weights from this seed alone, as `transform` does.
        **criteria: as for `transform`.

    Raises:
        SqueezeExciteError: an argument is not what is expected; then nothing has been changed.

    The interface is that of MosaicML Composer's `apply_squeeze_excite`.

    >>> net = nn.Sequential(nn.Conv2d(3, 256, 3), nn.BatchNorm2d(256), nn.ReLU())
    >>> apply_squeeze_excite(net, placement="norm", init="identity")
    >>> type(net).__name__, len(net), [key for key in net.state_dict() if "fc" in key]
    ('Sequential', 3, ['squeeze_excite.of_0.fc1.weight', 'squeeze_excite.of_0.fc2.weight'])
    """
    options = Options.given(
        min_channels=min_channels,
        latent_channels=latent_channels,
        placement=placement,
        init=init,
        bias=bias,
        activation=activation,
        gate=gate,
        block=block,
        where=where,
        stages=stages,
        necks=necks,
        overrides=overrides,
        **criteria,
    )
    check_alone(plan, options)
    check_seed(seed)
    chosen_optimizers = as_optimizers(optimizers)
    captured = capture(model)
    choice = choose(captured, options) if plan is None else fit(captured, plan)
    with kept_on_failure(model), undone_on_failure(model):
        with drawing_from(seed) as made_on:
            insertions = choice.insertions(made_on)
        insert_in_place(captured, insertions)
        give_plan(model, choice.after)
        new, paths = {site.name for site in choice.plan.sites}, block_names(model)
        owners = [(path, choice.convs[name], model.get_submodule(path)) for name, path in paths.items() if name in new]
        join = Joining(chosen_optimizers, owners)
        try:
            join.apply()
        except BaseException:  # an interrupt, too
            join.undo()
            raise
