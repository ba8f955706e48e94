"""Training batches of the embedded image model: pairs of images of a scene, and words.

Dimensions: ``b`` pairs of ``h`` x ``w`` pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from custom.fourd.diffusion.patch_autoencoder import PatchAutoencoder
from custom.fourd.mappers.composition import TIME, VIEW
from custom.fourd.world.grammar import WorldScene

from .embedded_training import Batch
from .world_clips import recolour_clip, spins
from .world_edits import draw_kind
from .world_pairs import NUM_AZIMUTHS, NUM_TIMES, PairGroups, twin_of
from .world_views import chance, colour_views, draw_backgrounds, say, view_suffix

TEXT_DROPOUT, IMAGE_DROPOUT = 0.1, 0.1
GREY_SHARE = 0.5
"""Of the pairs: another background than white. Nothing but the image prompt tells it, so pairs on
white alone would teach a model to do without looking."""
PAIR_SHARE = 0.35
"""Of the groups: two objects."""
SPIN_SHARE = 0.4
"""Of the groups: drawn among those in which something spins."""
KINDS = (("time", 0.28), ("view", 0.28), ("both", 0.28), ("identity", 0.16))
"""What differs between image prompt and target, and the share of the pairs."""
TOLD_SHARE = 0.5
"""Of the pairs in which the time, or the view, stays: its code is told all the same."""
WORDS_TOLD_SHARE = 0.9
"""The same of samples without images."""
SUFFIX_SHARE = 0.1
"""Of the captions: they also name the target's view."""
OTHER_COLOURS_SHARE, TWIN_SHARE = 0.06, 0.3
"""Of the pairs with words: the image prompt has other colours than they say; and, of those whose
group was rendered in another material as well, it is of that material."""


@dataclass
class ImageBatch(Batch):
    """Targets with their image prompts and with what the teacher may say of them."""

    prompt_images: Float[Tensor, "b h w 3"] | None = None
    """In [0, 1]."""
    sees_image: Bool[Tensor, "b"] | None = None
    frame_times: Float[Tensor, "b"] | None = None
    """Scene times of the targets."""
    azimuths_deg: Float[Tensor, "b"] | None = None
    """Of the targets' cameras."""
    told: dict[str, Bool[Tensor, "b"]] | None = None
    """Which targets' time and view are told, by placeholder."""
    generator: torch.Generator | None = None
    """Source of the teacher's disturbances."""


class PairSource:
    """Draws training batches; batch n is a pure function of (seed, n)."""

    def __init__(self, groups: list[PairGroups], vae: PatchAutoencoder, seed: int) -> None:
        self.vae, self.seed = vae, seed
        every = [(part, i) for part in groups for i in range(len(part.scenes))]
        self.places = {
            count: [(part, i) for part, i in every if len(part.scenes[i].objects) == count]
            for count in (1, 2)
        }
        self.spinning = {
            count: [place for place in places if spins(place[0].scenes[place[1]])] or places
            for count, places in self.places.items()
        }

    def batch(self, step: int, num_groups: int) -> ImageBatch:
        """4 `num_groups` pairs."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        count = 4 * num_groups
        backgrounds = draw_backgrounds(count, generator, GREY_SHARE)
        pairs = [self._pair(background, generator) for background in backgrounds]
        prompts, targets, captions, times, azimuths, told = zip(*pairs, strict=True)
        with torch.no_grad():
            latents = self.vae.encode(torch.cat(targets)).latent_dist.mode()
        return ImageBatch(
            latents,
            list(captions),
            None,
            1,
            prompt_images=(torch.cat(prompts).permute(0, 2, 3, 1) + 1) / 2,
            sees_image=torch.rand((count,), generator=generator) >= IMAGE_DROPOUT,
            frame_times=torch.stack(times),
            azimuths_deg=torch.stack(azimuths),
            told={name: torch.tensor([t[name] for t in told]) for name in (TIME, VIEW)},
            generator=generator,
        )

    def words(self, step: int, count: int) -> ImageBatch:
        """`count` prompts for any time and azimuth, without images.

        Half of them are of scenes in which something spins.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        captions = []
        for place in range(count):
            part, index = self._place(place % 2 == 1, generator)
            captions.append(say(recolour_clip(part.scenes[index], generator), generator))
        drawn = torch.rand((2, count), generator=generator)
        told = torch.rand((2, count), generator=generator) < WORDS_TOLD_SHARE
        return ImageBatch(
            torch.zeros(count, 0),
            captions,
            None,
            1,
            frame_times=drawn[0],
            azimuths_deg=360 * drawn[1],
            told=dict(zip((TIME, VIEW), told, strict=True)),
            generator=generator,
        )

    def _place(self, spinning: bool, generator: torch.Generator) -> tuple[PairGroups, int]:
        among = self.spinning if spinning else self.places
        wanted = 1 + chance(generator, PAIR_SHARE)
        places = among[wanted] or among[3 - wanted]
        return places[int(torch.randint(len(places), (), generator=generator))]

    def _pair(self, background: Tensor, generator: torch.Generator) -> tuple:
        """Image prompt and target, caption, the target's time and azimuth, what is told."""
        part, index = self._place(chance(generator, SPIN_SHARE), generator)
        kind = draw_kind(generator, KINDS)
        i, j = _two_places(NUM_TIMES, kind in ("time", "both"), generator)
        a, b = _two_places(NUM_AZIMUTHS, kind in ("view", "both"), generator)
        told = {
            TIME: i != j or chance(generator, TOLD_SHARE),
            VIEW: a != b or chance(generator, TOLD_SHARE),
        }
        scene = shown = recolour_clip(part.scenes[index], generator)
        source = index
        azimuth = part.azimuths_deg[index, b]
        caption = "" if chance(generator, TEXT_DROPOUT) else say(scene, generator)
        if caption and chance(generator, SUFFIX_SHARE):
            caption = f"{caption}, {view_suffix(float(azimuth))}"
        twin = twin_of(index, len(part.scenes))
        if caption and twin is not None and chance(generator, TWIN_SHARE):
            in_other = _coloured_as(part.scenes[twin], scene)
            if not in_other.is_held_out:
                shown, source = in_other, twin
        elif caption and chance(generator, OTHER_COLOURS_SHARE):
            shown = recolour_clip(scene, generator)
        row = background.unsqueeze(0)
        return (
            colour_views(part.layers[source, i, a].unsqueeze(0), [shown], row),
            colour_views(part.layers[index, j, b].unsqueeze(0), [scene], row),
            caption,
            part.frame_times[index, j],
            azimuth,
            told,
        )


def _two_places(count: int, differ: bool, generator: torch.Generator) -> tuple[int, int]:
    """Two of `count` places, different ones or the same."""
    first = int(torch.randint(count, (), generator=generator))
    step = 1 + int(torch.randint(count - 1, (), generator=generator)) if differ else 0
    return first, (first + step) % count


def _coloured_as(scene: WorldScene, other: WorldScene) -> WorldScene:
    """The scene with the colours of another of as many objects."""
    pairs = zip(scene.objects, other.objects, strict=True)
    return replace(scene, objects=tuple(replace(a, colour=b.colour) for a, b in pairs))
