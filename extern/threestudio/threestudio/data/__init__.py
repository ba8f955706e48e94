"""Data modules; a submodule is imported when it is first asked for, because it loads lightning."""

from threestudio.lazy import submodule_getattr as _submodule_getattr

__getattr__ = _submodule_getattr(__name__)
