"""Turn pretrained transformer language models into gated linear recurrent ones."""

from linearize.config import MixerConfig
from linearize.convert import convert, load, register, revert
from linearize.errors import LinearizeError

__all__ = ["LinearizeError", "MixerConfig", "convert", "load", "revert"]

register()
