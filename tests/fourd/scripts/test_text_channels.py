"""The way from placeholders to the U-Net: what is attended to, and who is deaf to the beacons."""

import pytest
import torch

from custom.fourd.mappers.composition import SUPER_CATEGORIES, TIME, VIEW, Composition
from custom.fourd.mappers.text_injection import TextInjection
from custom.fourd.scripts.embedded_models import build_image_unet, build_text_encoder
from custom.fourd.scripts.image_control import ControlTeacher, taught_contexts
from custom.fourd.scripts.make_family import make_tokenizer
from custom.fourd.scripts.text_channels import BEACON_NORM, EMBEDDING_NORM, PLACES, open_channels

CAPTIONS = ["a red cube bouncing", "a large green torus", "a blue ball next to a pink cone", ""] * 4


class Model:
    """A fresh text encoder and U-Net, with a teacher's contexts of all kinds of words."""

    def __init__(self):
        torch.manual_seed(0)
        self.encoder, self.unet = build_text_encoder().eval(), build_image_unet().eval()
        self.tokenizer, self.teacher = make_tokenizer(), ControlTeacher(128)
        self.injection = TextInjection(self.encoder, self.tokenizer, SUPER_CATEGORIES)

    def contexts(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        n = len(CAPTIONS)
        codes = self.teacher(torch.rand(n, generator=g), 6.28 * torch.rand(n, generator=g))
        heard = {name: torch.ones(n, dtype=torch.bool) for name in (TIME, VIEW)}
        prompts = [Composition().prompt(caption) for caption in CAPTIONS]
        return taught_contexts(self.injection, prompts, codes, heard, 1)

    def open(self):
        ids = self.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
        generator = torch.Generator().manual_seed(1)
        open_channels(self.injection, self.unet, self.contexts, ids, generator)

    def pooling(self):
        """Attention of the U-Net's pooling to the 77 rows, by head; the softmax written out."""
        embedding, seen = self.unet.add_embedding, []
        hook = embedding.pool.k_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        with torch.no_grad():
            embedding(self.contexts(seed=5).pooled)
            hook.remove()
            rows = seen[0]
            query = embedding.pool.q_proj(rows[:, 0]).unflatten(-1, (4, 32))
            key = embedding.pool.k_proj(rows).unflatten(-1, (4, 32))
        logits = torch.einsum("bhd,bnhd->bhn", query, key) / 32**0.5
        return logits.softmax(dim=-1)[:, :, 1:]


@pytest.fixture(scope="module")
def opened():
    model = Model()
    model.open()
    return model


def test_a_head_of_the_pooling_attends_to_each_placeholder(opened):
    before, after = Model().pooling(), opened.pooling()
    for place in PLACES:
        assert float(before[:, :, place].mean(0).max()) < 0.05
        assert float(after[:, :, place].mean(0).max()) > 0.6
    assert len({int(after[:, :, place].mean(0).argmax()) for place in PLACES}) == 2


def test_codes_reach_the_pooled_text_many_times_as_strongly(opened):
    def spread(model):
        """How far other words of the placeholders move the pooled text, which has unit length."""
        with torch.no_grad():
            embedding = model.unet.add_embedding
            first, second = (embedding(model.contexts(seed).pooled) for seed in (2, 3))
        return float((first - second).square().mean())

    assert spread(opened) > 5 * spread(Model())


def test_the_rows_of_placeholders_alone_have_beacons(opened):
    old, new = Model().encoder.embeddings, opened.encoder.embeddings
    moved = (new.position_embedding.weight - old.position_embedding.weight).detach()
    norms = moved.norm(dim=1)
    assert norms.nonzero().flatten().tolist() == list(PLACES)
    torch.testing.assert_close(norms[list(PLACES)], torch.full((2,), BEACON_NORM))
    one, other = moved[list(PLACES)]
    assert abs(float(one @ other)) < 1e-3 and float(moved.sum(dim=1).abs().max()) < 1e-3
    for name in SUPER_CATEGORIES:
        assert opened.injection.base_norm(name) == pytest.approx(EMBEDDING_NORM)


def test_cross_attention_is_deaf_to_the_beacons(opened):
    old, new = Model(), opened
    moved = new.encoder.embeddings.position_embedding.weight
    moved = (moved - old.encoder.embeddings.position_embedding.weight)[list(PLACES)]
    seen = moved * new.encoder.final_layer_norm.weight
    names = [n for n, _ in new.unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    assert len(names) == 14
    for name in names:
        heard = new.unet.get_submodule(name)(seen).norm()
        assert heard < 1e-3 * old.unet.get_submodule(name)(seen).norm(), name
