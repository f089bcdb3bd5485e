"""Turn pretrained transformer language models into gated linear recurrent ones."""

from linearize.checkpoint import load
from linearize.config import MixerConfig
from linearize.convert import convert, register, revert
from linearize.errors import LinearizeError
from linearize.recipe import Recipe
from linearize.recipe import read as read_recipe
from linearize.run import run

__all__ = ["LinearizeError", "MixerConfig", "Recipe", "convert", "load", "read_recipe", "revert", "run"]

register()
