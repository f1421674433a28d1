"""MosaicML Composer: an algorithm that puts blocks into a Trainer's model, in place, before training starts."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import se_fx

try:
    from composer.algorithms import BlurPool
    from composer.algorithms.warnings import NoEffectWarning
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger
except ImportError as error:
    raise ImportError(
        "se_fx.integrations.composer needs MosaicML Composer; docs/composer.md says how to install it beside a current PyTorch"
    ) from error

__all__ = ["SqueezeExcite"]

log = logging.getLogger(__name__)


class FxSqueezeExcite(Algorithm):
    """Puts Squeeze-and-Excitation blocks after the Conv2d layers of the Trainer's model, as `se_fx.apply_squeeze_excite`.

    It acts once, at `Event.INIT`: the model keeps its class and its keys, new parameters join the Trainer's
    optimizers, and all ranks draw equal blocks, from the Trainer's seed. Applied again, it adds nothing.

    Args:
        latent_channels: hidden width of the blocks (int >= 1), or a fraction in (0, 1) of the conv's output channels.
        min_channels: a Conv2d gets a block where it has at least as many *output* channels, or "auto".

    Raises:
        SqueezeExciteError: when it is applied: an argument is not what is expected, the model has no Conv2d, or the run
            has a BlurPool that replaces convs.

    The interface is that of Composer's own `SqueezeExcite`.
    """

    def __init__(self, latent_channels: float = 64, min_channels: int | str = 128) -> None:
        self.latent_channels = latent_channels
        self.min_channels = min_channels

    def __repr__(self) -> str:
        return f"SqueezeExcite(latent_channels={self.latent_channels!r}, min_channels={self.min_channels!r})"

    @staticmethod
    def required_on_load() -> bool:
        """Whether a checkpoint of a run with this algorithm needs it again: its weights have no other place to go."""
        return True

    def match(self, event: Event, state: State) -> bool:
        """Whether to act now: at `Event.INIT`."""
        return bool(event == Event.INIT)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Insert the blocks and log how many the model has now.

        Raises:
            SqueezeExciteError: an argument is not what is expected, the model has no Conv2d, or the run has a BlurPool that
                replaces convs; then nothing has changed.
        """
        if any(isinstance(algorithm, BlurPool) and algorithm.replace_convs for algorithm in state.algorithms):
            raise se_fx.SqueezeExciteError(
                "algorithms: BlurPool puts layers in the place of convs that call conv.forward, past the conv's block; "
                "give it replace_convs=False"
            )
        se_fx.apply_squeeze_excite(
            state.model, self.latent_channels, self.min_channels, optimizers=state.optimizers, seed=state.rank_zero_seed
        )
        count = sum(isinstance(module, se_fx.SqueezeExcite2d) for module in state.model.modules())
        if not count:
            warnings.warn(f"{self}: no Conv2d has min_channels; no block was inserted", NoEffectWarning, stacklevel=2)
        log.info("%r: %s has %d Squeeze-and-Excitation blocks now.", self, type(state.model).__name__, count)
        logger.log_hyperparameters({"squeeze_excite/num_squeeze_excite_layers": count})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the arguments with those of the run that a checkpoint is of.

        Raises:
            SqueezeExciteError: they differ.
        """
        if state["repr"] != repr(self):
            raise se_fx.SqueezeExciteError(
                f"load_path: the checkpoint was saved with {state['repr']}, and this run has {self!r}; give it those arguments"
            )


#: A checkpoint names algorithms by their class, and Composer applies those of its own that have such a name on loading: a
#: class called SqueezeExcite would get Composer's blocks on top.
SqueezeExcite = FxSqueezeExcite
