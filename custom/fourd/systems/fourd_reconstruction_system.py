"""A moving scene from videos with known cameras: `fourd-reconstruction-system`."""

from __future__ import annotations

import threestudio

from .video_reconstruction import VideoReconstruction


@threestudio.register("fourd-reconstruction-system")
class FourdReconstructionSystem(VideoReconstruction):
    """Fits a 4D field to the frames of a `VideoScene`; see `VideoReconstruction`."""
