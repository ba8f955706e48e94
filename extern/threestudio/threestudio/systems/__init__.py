"""Systems, their optimizers and schedulers."""

from threestudio.lazy import submodule_getattr as _submodule_getattr

__getattr__ = _submodule_getattr(__name__)
