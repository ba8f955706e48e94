"""Control tokens of an MMDiT: the stock model at gate zero, attention by hand, gradients."""

import copy
import logging

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import (
    Attention,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)

from custom.fourd.diffusion.mmdit_control import (
    ControlJointAttnProcessor,
    ControlTokens,
    IgnoreControl,
    MMDiTControl,
    set_mmdit_control,
)

BATCH, BLOCKS, WIDTH, TOKENS = 2, 3, 16, 4


@pytest.fixture(scope="module")
def made():
    """Three blocks, two of them with a second attention, norms of queries and keys, as SD3.5."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=BLOCKS, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=WIDTH,
        pooled_projection_dim=10, out_channels=4, pos_embed_max_size=8,
        dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip
    for parameter in model.parameters():
        if not bool(parameter.any()):
            # Zero-initialised modulation would hide every block from the output.
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture
def transformer(made):
    return copy.deepcopy(made)


def draws(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predict(transformer, **kwargs):
    return transformer(
        draws(BATCH, 4, 8, 8),
        encoder_hidden_states=draws(BATCH, 5, 12, seed=2),
        pooled_projections=draws(BATCH, 10, seed=3),
        timestep=torch.tensor([300.0, 700.0]),
        joint_attention_kwargs=kwargs or None,
    ).sample


def controlled(gate=0.0, seed=4):
    control = MMDiTControl(BLOCKS, WIDTH, TOKENS)
    torch.nn.init.constant_(control.gates, gate)
    shape = (BLOCKS, BATCH, control.mapper_width)
    base, bypass = draws(*shape, seed=seed), draws(*shape, seed=seed + 1)
    return control, base.requires_grad_(), bypass.requires_grad_()


def test_gate_zero_is_the_stock_model(transformer):
    stock = predict(transformer)
    table = set_mmdit_control(transformer)
    assert table == tuple(f"transformer_blocks.{block}" for block in range(BLOCKS))
    control, base, bypass = controlled()
    assert not bool(control.gates.any()), "gates start at zero"
    assert torch.equal(predict(transformer, control=control.tokens(base, bypass)), stock)
    assert torch.equal(predict(transformer), stock)
    control, base, bypass = controlled(gate=1.0)
    moved = predict(transformer, control=control.tokens(base, bypass)).detach() - stock
    assert float(moved.abs().max()) > 1e-3


def test_gradients_reach_every_block(transformer):
    set_mmdit_control(transformer)
    control, base, bypass = controlled(gate=1.0)
    (predict(transformer, control=control.tokens(base, bypass)) * draws(4, 8, 8)).sum().backward()
    for part in (base, bypass, control.gates):
        assert float(part.grad.flatten(1).norm(dim=1).min()) > 1e-6
    # At gate zero only the gates learn, and they do.
    control, base, bypass = controlled()
    (predict(transformer, control=control.tokens(base, bypass)) * draws(4, 8, 8)).sum().backward()
    assert float(control.gates.grad.norm(dim=1).min()) > 1e-6 and not bool(base.grad.any())


def test_gradient_checkpointing_changes_no_gradient(transformer):
    set_mmdit_control(transformer)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            transformer.train()
            transformer.enable_gradient_checkpointing()
        control, base, bypass = controlled(gate=0.5)
        sample = predict(transformer, control=control.tokens(base, bypass))
        (sample * draws(4, 8, 8)).sum().backward()
        found.append((base.grad, bypass.grad, control.gates.grad))
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_each_block_hears_its_own_tokens(transformer):
    set_mmdit_control(transformer)
    control, base, bypass = controlled(gate=1.0)
    heard = {}
    for block, module in enumerate(transformer.transformer_blocks):
        module.attn.register_forward_hook(
            lambda _, __, out, block=block: heard.__setitem__(block, out[0])
        )
    with torch.no_grad():
        predict(transformer, control=control.tokens(base, bypass))
        before = dict(heard)
        for changed in range(BLOCKS):
            other = base.clone()
            other[changed] = draws(*base.shape[1:], seed=9)
            predict(transformer, control=control.tokens(other, bypass))
            moved = [
                block for block in range(BLOCKS) if not torch.equal(heard[block], before[block])
            ]
            assert moved[0] == changed


def by_hand(attn, image, text, tokens, strength):
    """What the image queries find, one sample and head at a time."""

    def rms(rows, norm):
        return rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    out = torch.zeros_like(image)
    for sample in range(BATCH):
        length = torch.stack([row.norm() for row in text[sample]]).mean()
        base, bypass = (part[0, sample] for part in (tokens.base, tokens.bypass))
        keys = torch.stack([length * row / row.norm() for row in base])
        values = torch.stack(
            [key + strength * length * row / row.norm() for key, row in zip(keys, bypass)]
        )
        query, key, value = attn.to_q(image[sample]), attn.add_k_proj(keys), attn.add_v_proj(values)
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            q, k = rms(query[:, part], attn.norm_q), rms(key[:, part], attn.norm_added_k)
            out[sample, :, part] = (q @ k.T / 8**0.5).softmax(-1) @ value[:, part]
    return out


@torch.no_grad()
def test_attention_to_the_tokens_by_hand(transformer):
    attn = transformer.transformer_blocks[0].attn
    attn.norm_added_k.weight.copy_(draws(8, seed=6).abs())
    image, text = draws(BATCH, 6, WIDTH), 3 * draws(BATCH, 5, WIDTH, seed=2)
    control, base, bypass = controlled()
    control.gates.copy_(draws(BLOCKS, WIDTH, seed=8))
    control.bypass_strength = 0.7
    tokens = control.tokens(base, bypass)
    stock_image, stock_text = JointAttnProcessor2_0()(attn, image, text)
    ours, ours_text = ControlJointAttnProcessor(JointAttnProcessor2_0(), 0)(
        attn, image, text, control=tokens
    )
    expected = stock_image + control.gates[0] * by_hand(attn, image, text, tokens, 0.7)
    torch.testing.assert_close(ours, expected)
    assert torch.equal(ours_text, stock_text), "the text stream is not touched"


@torch.no_grad()
def test_an_image_prompt_stays_beside_it():
    torch.manual_seed(0)
    attn = Attention(
        query_dim=WIDTH, added_kv_proj_dim=WIDTH, dim_head=8, heads=2, out_dim=WIDTH,
        context_pre_only=False, bias=True, processor=JointAttnProcessor2_0(),
    )  # fmt: skip
    adapter = SD3IPAdapterJointAttnProcessor2_0(WIDTH, 6, 8, timesteps_emb_dim=9, scale=0.5)
    image, text = draws(BATCH, 6, WIDTH), draws(BATCH, 5, WIDTH, seed=2)
    prompt = {"ip_hidden_states": draws(BATCH, 3, 6), "temb": draws(BATCH, 9)}
    control, base, bypass = controlled(gate=1.0)
    tokens = control.tokens(base, bypass)
    plain = JointAttnProcessor2_0()
    of_prompt = adapter(attn, image, text, **prompt)[0] - plain(attn, image, text)[0]
    of_control = (
        ControlJointAttnProcessor(plain, 1)(attn, image, text, control=tokens)[0]
        - plain(attn, image, text)[0]
    )
    both = ControlJointAttnProcessor(adapter, 1)(attn, image, text, **prompt, control=tokens)[0]
    expected = plain(attn, image, text)[0] + of_prompt + of_control
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-5)


def test_the_second_attention_ignores_it_in_silence(transformer, caplog):
    set_mmdit_control(transformer)
    set_mmdit_control(transformer)
    processors = transformer.attn_processors
    seconds = [value for name, value in processors.items() if ".attn2." in name]
    assert len(seconds) == 2 and all(isinstance(each, IgnoreControl) for each in seconds)
    assert isinstance(seconds[0].inner, JointAttnProcessor2_0), "installed twice is installed once"
    control, base, bypass = controlled(gate=1.0)
    logger = logging.getLogger("diffusers.models.attention_processor")
    logger.addHandler(caplog.handler)
    try:
        predict(transformer, control=control.tokens(base, bypass))
    finally:
        logger.removeHandler(caplog.handler)
    assert [record for record in caplog.records if record.name == logger.name] == []


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="n_tokens is 1; expected at least 2"):
        MMDiTControl(BLOCKS, WIDTH, n_tokens=1)
    one = draws(BLOCKS, BATCH, 1, WIDTH)
    with pytest.raises(ValueError, match="there is 1 control token; expected at least 2, best 4"):
        ControlTokens(one, one, draws(BLOCKS, WIDTH))
    with pytest.raises(ValueError, match=r"expected both \(blocks, batch, tokens, width\)"):
        ControlTokens(one, one[:1], draws(BLOCKS, WIDTH))

    class Other:
        attn_processors = {"blocks.0.attn.processor": JointAttnProcessor2_0()}

    with pytest.raises(ValueError, match="Other has no joint attention in transformer_blocks"):
        set_mmdit_control(Other())
