"""The prompt processor of Zeroscope: its own CLIP-H text encoder, threestudio's words of views."""

from dataclasses import dataclass

import threestudio
from threestudio.models.prompt_processors.stable_diffusion_prompt_processor import (
    StableDiffusionPromptProcessor,
)


@threestudio.register("zeroscope-prompt-processor")
class ZeroscopePromptProcessor(StableDiffusionPromptProcessor):
    """Encodes as Stable Diffusion does, from the folder of the video model.

    4D-fy narrows front and back to 30 degrees for its image priors and leaves them at threestudio's
    45 degrees here, so a clip and an image of one camera may be worded differently.
    """

    @dataclass
    class Config(StableDiffusionPromptProcessor.Config):
        """No further keys."""

        pretrained_model_name_or_path: str = "cerspense/zeroscope_v2_576w"
        """Folder or hub id whose tokenizer and text encoder are used."""

    cfg: Config
