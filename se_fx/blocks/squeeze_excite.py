"""The Squeeze-and-Excitation block. Knows nothing of graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from se_fx.arguments import check_flag, check_floating, is_count, is_number
from se_fx.blocks.extra_state import decoded, encoded, function_name, same_function
from se_fx.errors import SqueezeExciteError, shown

__all__ = ["ACTIVATIONS", "GATES", "INITS", "MOST_CHANNELS", "SqueezeExcite2d", "latent_width"]

#: Gate functions by name. Each maps the excitation's logits to the factors a channel is scaled by.
GATES: dict[str, Callable[[], nn.Module]] = {"sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid}
#: Hidden activations by name.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
#: Initialisations by name; see `SqueezeExcite2d`.
INITS = ("default", "identity")
#: The most channels that a block is made for: more than any network has.
MOST_CHANNELS = 2**20


def latent_width(latent_channels: float, channels: int) -> int:
    """Hidden width of a block over `channels` channels.

    Args:
        latent_channels: a width (integer >= 1), or a fraction in (0, 1) of `channels`, the inverse of the paper's
            reduction ratio r.
        channels: channels of the feature map.

    Raises:
        SqueezeExciteError: `latent_channels` is neither, or wider than both 1024 and four times the channels. No block has a
            use for more, and so there is a bound to the memory that a plan from elsewhere can ask for.

    >>> latent_width(64, 512), latent_width(1 / 16, 512), latent_width(1 / 16, 8)
    (64, 32, 1)
    """
    if not is_number(latent_channels) or not (
        0 < latent_channels < 1 or (latent_channels >= 1 and float(latent_channels).is_integer())
    ):
        raise SqueezeExciteError(
            f"latent_channels={shown(latent_channels)}: expected a hidden width (an integer >= 1, such as 64) "
            "or a fraction of the channels in (0, 1), such as 1/16"
        )
    width = int(latent_channels) if latent_channels >= 1 else max(1, round(latent_channels * channels))
    widest = max(1024, 4 * channels)
    if width > widest:
        raise SqueezeExciteError(
            f"latent_channels={shown(latent_channels)}: expected a hidden width of at most {widest}, which is four times the "
            f"{channels} channels, or 1024"
        )
    return width


class SqueezeExcite2d(nn.Module):
    r"""Squeeze-and-Excitation: scale each channel by a gate computed from all channels' spatial means.

    For U of shape (N, C, H, W), or unbatched (C, H, W):

    .. math:: y = U \cdot g, \quad g = k \, \sigma(W_2 \, \delta(W_1 \, \mathrm{mean}_{H,W}(U)))

    where :math:`\delta` is the activation, :math:`\sigma` the gate and k is 1, or, with ``init="identity"``,
    :math:`1 / \sigma(0)`.

    Source: Hu, Shen, Sun, *Squeeze-and-Excitation Networks*, arXiv 1709.01507, section 3. Without biases it is the
    block of MosaicML Composer's Squeeze-Excite.

    Args:
        num_features: C, the channels of the input, at most 2**20.
        latent_channels: hidden width (integer >= 1), or a fraction in (0, 1) of C; at most 4 C, or 1024 where that is more.
        bias: whether the two linear layers have biases.
        activation: a name in `ACTIVATIONS`, or a callable on tensors (a module included).
        gate: a name in `GATES`, or a callable on tensors (a module included).
        init: ``"default"`` initialises both layers as `nn.Linear` does. ``"identity"`` zeroes the second one and scales
            the gate so that it is exactly 1.0 until training moves it: outputs equal inputs bitwise, where the hidden
            layer's values are finite.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        SqueezeExciteError: an argument is out of range, or the gate cannot be made exactly 1.0 for ``init="identity"``.

    >>> block = SqueezeExcite2d(8, latent_channels=0.25, init="identity")
    >>> x = torch.randn(2, 8, 5, 5)
    >>> torch.equal(block(x), x)
    True
    """

    def __init__(
        self,
        num_features: int,
        latent_channels: float = 0.125,
        *,
        bias: bool = False,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        gate: str | Callable[[Tensor], Tensor] = "sigmoid",
        init: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not is_count(num_features) or num_features > MOST_CHANNELS:
            raise SqueezeExciteError(
                f"num_features={shown(num_features)}: expected the number of channels, an integer from 1 to 2**20"
            )
        if not isinstance(init, str) or init not in INITS:
            raise SqueezeExciteError(f"init={shown(init)}: expected one of {', '.join(map(repr, INITS))}")
        check_flag("bias", bias)
        _check_place(device, dtype)
        width = latent_width(latent_channels, num_features)
        hidden, last = _from_table("activation", activation, ACTIVATIONS), _from_table("gate", gate, GATES)
        self.gate_scale = _identity_scale(last) if init == "identity" else 1.0
        self.num_features = num_features
        self.latent_channels = width
        self.fc1 = nn.Linear(num_features, width, bias=bias, device=device, dtype=dtype)
        self.activation = hidden
        self.fc2 = nn.Linear(width, num_features, bias=bias, device=device, dtype=dtype)
        self.gate = last
        if init == "identity":
            nn.init.zeros_(self.fc2.weight)
            if bias:
                nn.init.zeros_(self.fc2.bias)

    def excitation(self, x: Tensor) -> Tensor:
        """The gate of each channel: (N, C, H, W) to (N, C, 1, 1); (C, H, W) to (C, 1, 1)."""
        squeezed = x.mean((-2, -1))
        gate = self.gate(self.fc2(self.activation(self.fc1(squeezed))))
        if self.gate_scale != 1.0:
            gate = gate * self.gate_scale
        return gate.to(x.dtype)[..., None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Scale (N, C, H, W), or (C, H, W), channel by channel; same shape, dtype and memory format."""
        return x * self.excitation(x)

    def get_extra_state(self) -> Tensor:
        """What a checkpoint says of the block beside its weights: `gate_scale`, and the names of gate and activation."""
        names = {option: function_name(getattr(self, option), table) for option, table in _TABLES.items()}
        return encoded({"gate_scale": self.gate_scale, **names})

    def set_extra_state(self, state: Any) -> None:
        """Take over `gate_scale` from a checkpoint, as `load_state_dict` does, also where keys may be missing.

        Raises:
            SqueezeExciteError: the weights are those of a block with another gate or activation; or `state` is not readable.
        """
        saved = decoded(state)
        if saved is None:
            return
        own = {option: function_name(getattr(self, option), table) for option, table in _TABLES.items()}
        for option, name in own.items():
            if not same_function(saved.get(option), name):
                raise SqueezeExciteError(
                    f"{option}: the checkpoint is of a block with {option}={shown(saved.get(option))}, and this one has "
                    f"{option}={name!r}, with which its weights mean something else; make the block with that {option}"
                )
        if saved.keys() - own.keys() != {"gate_scale"} or not _is_scale(saved["gate_scale"]):
            raise SqueezeExciteError(
                f"_extra_state={shown(saved)}: expected gate_scale, a number, and gate and activation; it is of another version"
            )
        self.gate_scale = float(saved["gate_scale"])

    def extra_repr(self) -> str:
        """The block's numbers, for `repr`."""
        scale = "" if self.gate_scale == 1.0 else f", gate_scale={self.gate_scale}"
        return f"{self.num_features}, latent_channels={self.latent_channels}{scale}"


def _is_scale(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


_TABLES = {"gate": GATES, "activation": ACTIVATIONS}


def _from_table(
    argument: str, choice: str | Callable[[Tensor], Tensor], table: dict[str, Callable[[], nn.Module]]
) -> Callable[[Tensor], Tensor]:
    if isinstance(choice, str) and choice in table:
        return table[choice]()
    if isinstance(choice, (str, type)) or not callable(choice):
        raise SqueezeExciteError(
            f"{argument}={shown(choice)}: expected one of {', '.join(map(repr, table))}, or a callable on tensors "
            "(an instance, not a class)"
        )
    return choice


def _check_place(device: Any, dtype: Any) -> None:
    if dtype is not None:
        check_floating("dtype", dtype, "None, or ")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise SqueezeExciteError(
            f"device={shown(device)}: expected None, or a device of this machine such as 'cpu' ({type(error).__name__})"
        ) from error


def _identity_scale(gate: Callable[[Tensor], Any]) -> float:
    try:
        with unset_fake_temporarily():
            at_zero = float(gate(torch.zeros(1, device="cpu")))
    except Exception as error:
        raise SqueezeExciteError(
            f"gate={shown(gate)} with init='identity': expected a function of a tensor to one of the same shape, and "
            f"for a single zero on the CPU it raised {type(error).__name__}; use init='default'"
        ) from error
    scale = 1.0 / at_zero if at_zero else 0.0
    if scale * at_zero != 1.0 or math.frexp(scale)[0] != 0.5:
        raise SqueezeExciteError(
            f"gate={shown(gate)} with init='identity': the gate is {at_zero} at zero, which no power of two scales to "
            "exactly 1.0; use gate='sigmoid', gate='hardsigmoid', or init='default'"
        )
    return scale
