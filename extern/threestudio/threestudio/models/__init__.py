"""Models: geometry, materials, backgrounds, renderers, guidance, prompts."""

from threestudio.lazy import submodule_getattr as _submodule_getattr

__getattr__ = _submodule_getattr(__name__)
