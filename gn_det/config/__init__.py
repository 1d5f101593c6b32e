"""Config keys, and reading config files."""

from .defaults import add_gn_config
from .files import dump_config, get_config, load_config, load_lazy_config

__all__ = ["add_gn_config", "dump_config", "get_config", "load_config", "load_lazy_config"]
