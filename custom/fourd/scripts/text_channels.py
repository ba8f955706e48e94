"""A strong way from a prompt's placeholders to the U-Net, opened before the image model trains.

A trained text encoder hardly looks at two new words before a caption: of 77 rows they are two, and
their embeddings are short. Learning to look takes thousands of steps. So the rows of the
placeholders get beacons, directions that no other row has, in their position embeddings; one
attention head of each layer of the text encoder, and of the U-Net's pooling one for each
placeholder, is set to attend to the beacon; all else is made deaf to it. Training goes on from
there. The heads are those whose absence changes the pooled words least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from custom.fourd.diffusion.layer_contexts import LayerContexts
from custom.fourd.mappers.text_injection import TextInjection

EMBEDDING_NORM, BEACON_NORM = 12.0, 8.0
"""Lengths of the super-categories' embeddings, thus of mappers' bases, and of the beacons."""
LOGIT = 6.5
"""How much higher a row with a beacon stands in a head that is set to attend to it: of 77 rows it
gets nine tenths of the attention."""
PLACES = (1, 2)
"""Of the placeholders in a prompt, after the token that starts it."""


@torch.no_grad()
def open_channels(
    injection: TextInjection,
    unet: nn.Module,
    sample: Callable[[], LayerContexts],
    plain: Int[Tensor, "b n"],
    generator: torch.Generator,
) -> None:
    """Change the text encoder and the U-Net, in place.

    Args:
        injection: of the text encoder; its placeholders stand at `PLACES`.
        unet: pools its text (`addition_embed_type` "text").
        sample: makes contexts of prompts whose placeholders carry all kinds of words.
        plain: tokens of ordinary captions, to choose the heads by.
        generator: source of the beacons' directions.
    """
    encoder, width = injection.encoder, injection.width
    embeddings, pool = encoder.embeddings, unet.add_embedding.pool
    heads = encoder.config.num_attention_heads
    layers = [layer.self_attn for layer in encoder.encoder.layers]
    pooled = _pooled(injection, unet, plain)
    spare = [_least_missed(pooled, a.out_proj.weight.T, heads)[:1] for a in layers]
    spare_of_pool = _least_missed(pooled, pool.v_proj.weight, pool.num_heads)[: len(PLACES)]

    # Norms take the mean of a row out, so a beacon has none.
    drawn = torch.cat((torch.ones(width, 1), torch.randn(width, 2, generator=generator)), dim=1)
    beacons = torch.linalg.qr(drawn)[0][:, 1:].T
    for index in injection.super_ids.values():
        row = embeddings.token_embedding.weight[index]
        row.mul_(EMBEDDING_NORM / row.norm())
    for place, beacon in zip(PLACES, beacons, strict=True):
        embeddings.position_embedding.weight[place] += BEACON_NORM * beacon
    _deafen(encoder, unet, beacons)

    for layer, (head,) in zip(encoder.encoder.layers, spare, strict=True):
        attention = layer.self_attn
        rows = _inputs(attention.k_proj, sample)
        _attend(attention.q_proj, attention.k_proj, head, heads, _contrast(rows, PLACES))
    for place, head in zip(PLACES, spare_of_pool, strict=True):
        rows = _inputs(pool.k_proj, lambda: unet.add_embedding(sample().pooled))[:, 1:]
        _attend(pool.q_proj, pool.k_proj, head, pool.num_heads, _contrast(rows, (place,)))


def _pooled(injection: TextInjection, unet: nn.Module, plain: Tensor) -> Callable[[], Tensor]:
    return lambda: unet.add_embedding(injection.encoder(plain).last_hidden_state)


def _least_missed(pooled: Callable[[], Tensor], weight: Tensor, heads: int) -> list[int]:
    """Heads, whose parts of `weight` are rows, by how little zeroing them changes the result."""
    whole, changes = pooled(), []
    for part in weight.chunk(heads):
        kept = part.clone()
        part.zero_()
        changes.append(float((pooled() - whole).square().mean()))
        part.copy_(kept)
    return sorted(range(heads), key=changes.__getitem__)


def _deafen(encoder: nn.Module, unet: nn.Module, beacons: Float[Tensor, "2 d"]) -> None:
    """Take the beacons out of what every reader of a normalised row sees."""
    for layer in encoder.encoder.layers:
        attention = layer.self_attn
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
            _mute(reader, beacons * layer.layer_norm1.weight)
        _mute(layer.mlp.fc1, beacons * layer.layer_norm2.weight)
    final = beacons * encoder.final_layer_norm.weight
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            _mute(module, final)
    pool, norm = unet.add_embedding.pool, unet.add_embedding.norm1
    for reader in (pool.q_proj, pool.k_proj, pool.v_proj):
        _mute(reader, (final - final.mean(dim=1, keepdim=True)) * norm.weight)


def _mute(linear: nn.Linear, directions: Float[Tensor, "k d"]) -> None:
    basis = torch.linalg.qr(directions.T)[0]
    linear.weight -= linear.weight @ basis @ basis.T


def _inputs(module: nn.Module, run: Callable[[], object]) -> Float[Tensor, "b n d"]:
    """What a module is given while `run` runs."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        run()
    finally:
        hook.remove()
    return seen[0]


def _contrast(rows: Float[Tensor, "b n d"], places: Sequence[int]) -> Float[Tensor, "d"]:
    """Fisher's direction: the rows at `places` stand 1 higher in it than the others on average."""
    chosen = rows[:, list(places)].flatten(0, 1)
    others = rows[:, [k for k in range(rows.shape[1]) if k not in places]].flatten(0, 1)
    spread = torch.cov(chosen.T) + torch.cov(others.T)
    spread.diagonal().add_(0.01 * spread.diagonal().mean())
    offset = chosen.mean(dim=0) - others.mean(dim=0)
    direction = torch.linalg.solve(spread, offset)
    return direction / (direction @ offset)


def _attend(query: nn.Linear, key: nn.Linear, head: int, heads: int, direction: Tensor) -> None:
    """Let a head attend to rows by how far they go in a direction, whoever asks."""
    size = query.out_features // heads
    part = slice(head * size, (head + 1) * size)
    for linear in (query, key):
        linear.weight[part] = 0
        linear.bias[part] = 0
    # The product of query and key is divided by sqrt(size).
    query.bias[part] = (LOGIT / size**0.5) ** 0.5
    key.weight[part] = direction * (LOGIT / size**0.5) ** 0.5
