"""Settings of the whole suite: one thread per worker, since the workers already share the cores."""

import os

# Before torch is imported: its thread pool is sized once, from the environment.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
