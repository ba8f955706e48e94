"""Multiresolution hash grids: one contract, interchangeable back ends.

``hash_grid`` holds the contract and the choice of back end, ``torch_backend`` the PyTorch twin that
defines the semantics, ``cpu_backend`` the compiled CPU kernel. Importing this builds nothing.
"""

from threestudio.kernels.grid_layout import GridLayout
from threestudio.kernels.hash_grid import HashGridEncoding, available_backends, hash_grid_encode

__all__ = ["GridLayout", "HashGridEncoding", "available_backends", "hash_grid_encode"]
