"""What `import nvdiffrast.torch` finds without the package: names that say what they need.

Rasterising triangles with gradients takes nvdiffrast and a CUDA GPU; there is no replacement here.
"""

__all__: list[str] = []
ABSENT = (
    "RasterizeCudaContext",
    "RasterizeGLContext",
    "DepthPeeler",
    "rasterize",
    "interpolate",
    "texture",
    "texture_construct_mip",
    "antialias",
    "antialias_construct_topology_hash",
    "get_log_level",
    "set_log_level",
)
