"""Text embeddings of a prompt, ready to be looked up by the cameras of a batch."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from threestudio.models.prompt_processors.view_directions import (
    DirectionConfig,
    direction_indices,
    shift_azimuth_deg,
)

PerpNegCoefficients = tuple[float | int, float | int, float | int]


@dataclass
class PromptProcessorOutput:
    """What a prompt processor returns when it is called.

    ``n`` is the number of directions (4), ``l`` the tokens of a text, ``d`` their width.
    """

    text_embeddings: Float[Tensor, "1 l d"]
    """Embedding of the prompt as given."""
    uncond_text_embeddings: Float[Tensor, "1 l d"]
    """Embedding of the negative prompt."""
    text_embeddings_vd: Float[Tensor, "n l d"]
    """Embeddings of the prompt with each direction's words."""
    uncond_text_embeddings_vd: Float[Tensor, "n l d"]
    """Embeddings of the negative prompt for each direction."""
    directions: list[DirectionConfig]
    """The directions, in the order of the embeddings."""
    direction2idx: dict[str, int]
    """Index of each direction by its name."""
    use_perp_neg: bool
    """Whether guidances should use `get_text_embeddings_perp_neg`."""
    perp_neg_f_sb: PerpNegCoefficients = (1, 0.5, -0.606)
    """(a, b, c) of f(r) = a exp(-b r) + c: weight of "side" as the negative of side-to-back."""
    perp_neg_f_fsb: PerpNegCoefficients = (1, 0.5, +0.967)
    """The same of "front" as the negative of side-to-back."""
    perp_neg_f_fs: PerpNegCoefficients = (4, 0.5, -2.426)
    """The same of "front" as the negative of front-to-side."""
    perp_neg_f_sf: PerpNegCoefficients = (4, 0.5, -2.426)
    """The same of "side" as the negative of front-to-side, at 1 - r."""
    prompt: str = ""
    """The prompt as given."""
    prompts_vd: list[str] = field(default_factory=list)
    """The prompt of each direction."""

    def get_text_embeddings(
        self,
        elevation: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        camera_distances: Float[Tensor, "B"],
        view_dependent_prompting: bool = True,
    ) -> Float[Tensor, "2*B l d"]:
        """Return the embedding of each view, then the unconditional one of each view.

        Args:
            elevation: degrees above the horizon.
            azimuth: degrees; 0 is the front.
            camera_distances: distances to the origin, world units.
            view_dependent_prompting: False gives every view the plain prompt.
        """
        batch = elevation.shape[0]
        if view_dependent_prompting:
            indices = direction_indices(self.directions, elevation, azimuth, camera_distances)
            indices = indices.to(self.text_embeddings_vd.device)
            text = self.text_embeddings_vd[indices]
            uncond = self.uncond_text_embeddings_vd[indices]
        else:
            text = self.text_embeddings.expand(batch, -1, -1)
            uncond = self.uncond_text_embeddings.expand(batch, -1, -1)
        return torch.cat([text, uncond], dim=0)

    def get_text_embeddings_perp_neg(
        self,
        elevation: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        camera_distances: Float[Tensor, "B"],
        view_dependent_prompting: bool = True,
    ) -> tuple[Float[Tensor, "4B l d"], Float[Tensor, "B 2"]]:
        """Return embeddings and weights for `perp_neg_guidance`.

        The rows are: positive of each view, unconditional of each view, then the two negatives of
        view 0, of view 1, and so on. With phi the wrapped azimuth: in front of the object
        (|phi| < 90), r = 1 - |phi| / 90, the positive is r * front + (1 - r) * side and the
        negatives are (front, side) with weights (-f_fs(r), -f_sf(1 - r)). Behind it,
        r = 2 - |phi| / 90, r * side + (1 - r) * back, (side, front), (-f_sb(r), -f_fsb(r)).
        Overhead views take their own embedding, and weights of 0.

        Raises:
            ValueError: if ``view_dependent_prompting`` is False.
        """
        if not view_dependent_prompting:
            raise ValueError(
                "use_perp_neg needs view-dependent prompts; set view_dependent_prompting=true in "
                "the guidance, or use_perp_neg=false in the prompt processor."
            )
        device = self.text_embeddings_vd.device
        indices = direction_indices(self.directions, elevation, azimuth, camera_distances)
        indices = indices.to(device)
        side, front, back = (
            self.text_embeddings_vd[self.direction2idx[name]] for name in ("side", "front", "back")
        )
        turned = shift_azimuth_deg(azimuth).abs().to(device) / 90.0
        is_front = turned < 1.0
        r = torch.where(is_front, 1.0 - turned, 2.0 - turned)
        share = r.view(-1, 1, 1)
        in_front = is_front.view(-1, 1, 1)
        positive = torch.where(
            in_front, share * front + (1 - share) * side, share * side + (1 - share) * back
        )
        uncond = self.uncond_text_embeddings_vd[indices]
        negatives = torch.stack(
            [torch.where(in_front, front, side), torch.where(in_front, side, front)], dim=1
        )
        weights = torch.stack(
            [
                -torch.where(
                    is_front, _decay(self.perp_neg_f_fs, r), _decay(self.perp_neg_f_sb, r)
                ),
                -torch.where(
                    is_front, _decay(self.perp_neg_f_sf, 1 - r), _decay(self.perp_neg_f_fsb, r)
                ),
            ],
            dim=1,
        )
        overhead = indices == self.direction2idx["overhead"]
        far = overhead.view(-1, 1, 1)
        positive = torch.where(far, self.text_embeddings_vd[indices], positive)
        negatives = torch.where(far.unsqueeze(1), uncond.unsqueeze(1), negatives)
        weights = torch.where(overhead.unsqueeze(1), torch.zeros_like(weights), weights)
        return torch.cat([positive, uncond, negatives.flatten(0, 1)], dim=0), weights


def _decay(coefficients: PerpNegCoefficients, r: Tensor) -> Tensor:
    a, b, c = coefficients
    return a * torch.exp(-b * r) + c
