"""threestudio: an independent runtime of the threestudio extension and launch contract.

Importing the package loads nothing heavy: built-in modules are listed in
`threestudio.registry_table` and imported by `find`, subpackages by attribute access.
"""

from threestudio import registry_refusals as _refusals
from threestudio import registry_table as _table
from threestudio.lazy import submodule_getattr as _submodule_getattr
from threestudio.logs import debug, info, logger, warn
from threestudio.registry import (
    __modules__,
    find,
    register,
    register_alias,
    register_lazy,
    register_refusal,
)

__version__ = "0.3.0"

__all__ = [
    "__modules__",
    "__version__",
    "debug",
    "find",
    "info",
    "logger",
    "register",
    "register_alias",
    "register_lazy",
    "register_refusal",
    "warn",
]

for _name, _module in _table.BUILTINS.items():
    register_lazy(_name, _module)
for _name, _target in _table.ALIASES.items():
    register_alias(_name, _target)
for _name, _reason in _refusals.REFUSED.items():
    register_refusal(_name, _reason)

__getattr__ = _submodule_getattr(__name__)
