"""The instruction of an edit, as InstructPix2Pix's text encoder sees it."""

from dataclasses import dataclass

import threestudio
import torch
from jaxtyping import Float
from threestudio.models.prompt_processors.stable_diffusion_prompt_processor import (
    StableDiffusionPromptProcessor,
)
from threestudio.models.prompt_processors.vocabulary import check_words, read_vocabulary
from torch import Tensor

from custom.fourd.world.edits import parse_instruction


@threestudio.register("instruction-prompt-processor")
class InstructionPromptProcessor(StableDiffusionPromptProcessor):
    """Encodes an instruction and the empty text, for the three branches of the guidance.

    The embedded text encoder knows the world alone: there, an instruction that is not of the
    world, or asks for motion, is refused with a sentence.
    """

    @dataclass
    class Config(StableDiffusionPromptProcessor.Config):
        """Those of other prompt processors that concern prompts and views are unused."""

        instruction: str = ""
        """What to do to the images, such as "make it look like a van gogh painting"."""
        pretrained_model_name_or_path: str = "timbrooks/instruct-pix2pix"
        """Folder, hub id or ``embedded://name`` whose tokenizer and text encoder are used."""

    cfg: Config

    def configure(self) -> None:
        """Make or load the embeddings.

        Raises:
            ModelUnavailableError: if embeddings must be computed and the model cannot be had.
            ValueError: if there is no instruction, or the embedded model cannot follow it.
        """
        if not self.cfg.instruction.strip():
            raise ValueError(
                "instruction is empty; expected what to do to the images, for example "
                "instruction='make it look like a van gogh painting'."
            )
        self.cfg.prompt, self.cfg.negative_prompt = self.cfg.instruction, ""
        super().configure()

    def prepare_text_embeddings(self) -> None:
        """Encode the two texts; an instruction means the same from every side."""
        self.prompts_vd = [self.prompt] * len(self.directions)
        self.negative_prompts_vd = [""] * len(self.directions)
        super().prepare_text_embeddings()

    def check_prompts(self) -> None:
        """Refuse what an embedded text encoder does not know."""
        vocabulary = read_vocabulary(self._folder)
        model = self.cfg.pretrained_model_name_or_path
        check_words(model, vocabulary, [self.prompt], "instruction")
        if vocabulary is not None:
            parse_instruction(self.prompt)

    def embeddings(self) -> Float[Tensor, "3 l d"]:
        """Of [instruction, "", ""], on this processor's device."""
        return torch.cat((self.text_embeddings, self.uncond_text_embeddings.repeat(2, 1, 1)))
