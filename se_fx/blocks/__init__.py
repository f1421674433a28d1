"""Blocks: numbers in, a module that scales feature maps out. Knows nothing of graphs, nor of where it will stand."""

from se_fx.blocks.identity_start import IdentityStart
from se_fx.blocks.named import BLOCKS, ConcurrentSqueezeExcite2d, OfTimm, SimAM
from se_fx.blocks.squeeze_excite import ACTIVATIONS, GATES, INITS, MOST_CHANNELS, SqueezeExcite2d, latent_width

__all__ = [
    "ACTIVATIONS",
    "BLOCKS",
    "GATES",
    "INITS",
    "MOST_CHANNELS",
    "ConcurrentSqueezeExcite2d",
    "IdentityStart",
    "OfTimm",
    "SimAM",
    "SqueezeExcite2d",
    "latent_width",
]
