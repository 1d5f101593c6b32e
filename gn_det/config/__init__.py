"""Config keys, and reading config files."""

from gn_det.config.defaults import add_gn_config
from gn_det.config.differences import differences, settings
from gn_det.config.files import dump_config, get_config, load_config, load_lazy_config

__all__ = [
    "add_gn_config",
    "differences",
    "dump_config",
    "get_config",
    "load_config",
    "load_lazy_config",
    "settings",
]
