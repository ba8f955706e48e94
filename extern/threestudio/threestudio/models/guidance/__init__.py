"""Guidances: frozen priors that score rendered images."""

from threestudio.lazy import submodule_getattr as _submodule_getattr

__getattr__ = _submodule_getattr(__name__)
