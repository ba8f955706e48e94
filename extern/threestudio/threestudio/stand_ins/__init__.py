"""What answers the imports of packages that need CUDA to be built, where they are not installed.

`finder` decides when; one module per package says what there is. tiny-cuda-nn's is
`threestudio.kernels.tinycudann`.
"""
