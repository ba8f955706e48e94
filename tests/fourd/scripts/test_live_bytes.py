"""Counting live memory: what is made, kept and freed, against sizes known by hand."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from custom.fourd.scripts.live_bytes import FusedAttention, LiveBytes


def test_only_what_is_made_and_lives_is_counted():
    weight = torch.ones(10, 100)
    with LiveBytes() as live:
        view = weight.t() + 0  # 4000 bytes; the view itself is the weight's
        temporary = torch.cat((view, view))  # 8000 more
        del temporary
        assert live.now == 4000 and live.peak == 12000
        weight.view(-1)
        assert live.now == 4000


def test_what_a_graph_keeps_is_counted():
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        y = (x * 2).exp().sin()  # sin keeps exp's result, which exp itself keeps too
        assert live.now == 2 * 4000
        del y
        assert live.now == 0


def test_fused_attention_keeps_the_result_only():
    query = torch.randn(1, 1, 64, 8, device="meta")
    with FusedAttention(), LiveBytes() as live:
        result = scaled_dot_product_attention(query, query, query)
    assert result.shape == query.shape and live.peak == 64 * 8 * 4
