"""Blocks: numbers in, a module that scales feature maps out. Knows nothing of graphs, nor of where it will stand."""

from se_fx.blocks.squeeze_excite import ACTIVATIONS, BLOCKS, GATES, INITS, MOST_CHANNELS, SqueezeExcite2d, latent_width

__all__ = ["ACTIVATIONS", "BLOCKS", "GATES", "INITS", "MOST_CHANNELS", "SqueezeExcite2d", "latent_width"]
