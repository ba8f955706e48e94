"""Keys of an edit: published values where nothing is said, and what is refused."""

import pytest

from custom.fourd.editing.options import Strength, edit_options, strength


def pair(found):
    return found.start, found.steps


@pytest.mark.parametrize(
    ("order", "overlap", "first", "later", "attention"),
    [
        ("release", 0, (700, 6), (700, 6), "anchor"),
        ("paper", 0, (700, 6), (700, 6), "anchor"),
        ("single_view", 1, (700, 5), (550, 3), "anchor_self"),
        ("frame_wise", 0, (1000, 20), (1000, 20), "none"),
    ],
)
def test_published_values_of_each_order(order, overlap, first, later, attention):
    options = edit_options({"order": order})
    assert pair(strength(options, "key")) == (1000, 20)
    assert pair(strength(options, "restview_refine")) == (800, 10)
    assert pair(strength(options, "refine")) == first
    assert pair(strength(options, "refine", is_later=True)) == later
    assert (options.overlap_length, options.attention) == (overlap, attention)
    assert (options.warm_up_steps, options.sequence_length, options.warp_ratio) == (12, 5, 0.5)
    assert options.later_passes_from == ("render" if order == "paper" else "buffer")


def test_what_is_said_wins_and_later_passes_follow_the_first():
    options = edit_options({"refine_num_steps": 600, "refine_diffusion_steps": 4})
    assert pair(strength(options, "refine", is_later=True)) == (600, 4)
    options = edit_options({"order": "single_view", "later_refine_num_steps": 400})
    assert pair(strength(options, "refine", is_later=True)) == (400, 3)
    assert edit_options({"use_anchor": False}).attention == "none", "there is nothing to look at"


def test_a_scaled_strength_is_cut_off_as_published():
    assert Strength(1000, 20).scaled(0.99659) == Strength(996, 19)
    assert Strength(3, 1).scaled(0.1) == Strength(1, 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"order": "random"}, "system.edit.order is 'random'; expected one of release, paper"),
        ({"attention": "self"}, "system.edit.attention is 'self'; expected one of null, anchor"),
        ({"flow_check": "loose"}, "system.edit.flow_check is 'loose'; expected one of strict"),
        ({"passes": 0}, "system.edit.passes is 0; expected 1 or more"),
        ({"post_edit_steps": -1}, "system.edit.post_edit_steps is -1; expected 0 or more"),
        ({"warp_ratio": 1.5}, "system.edit.warp_ratio is 1.5; expected a share from 0 to 1"),
        ({"depth_tau_rest": 0.0}, "system.edit.depth_tau_rest is 0.0; expected more than 0"),
        ({"overlap_length": 5}, "overlap_length is 5 and sequence_length 5; expected a window"),
        ({"device": "cuda:1"}, "system.edit.device is 'cuda:1', but executor=interleaved"),
    ],
)
def test_values_that_cannot_work_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        edit_options(keys)


def test_an_unknown_key_is_refused():
    with pytest.raises(TypeError, match="passess"):
        edit_options({"passess": 2})
