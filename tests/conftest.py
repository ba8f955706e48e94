"""Settings of the whole suite: one thread per worker, since the workers already share the cores."""

import gc
import os
import sys

import pytest

# Before torch is imported: its thread pool is sized once, from the environment.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_MANY_MODULES = 200
_modules_set_aside = 0


@pytest.fixture(autouse=True, scope="module")
def _libraries_are_no_garbage():
    """Set the objects of loaded libraries aside, so that collecting garbage passes them by.

    Writing a video and ending a batch collect garbage, which looks at millions of objects of
    torch, diffusers and transformers each time; these stay until the process ends anyway.
    """
    global _modules_set_aside
    if len(sys.modules) > _modules_set_aside + _MANY_MODULES:
        gc.collect()
        gc.freeze()
        _modules_set_aside = len(sys.modules)
