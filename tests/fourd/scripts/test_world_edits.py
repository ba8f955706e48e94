"""Training pairs of edits: words, layers and colours belong together, nothing held out is drawn."""

import pytest
import torch

from custom.fourd.scripts.make_family import vocabulary
from custom.fourd.scripts.world_edits import (
    ANCHORED_LOOK_EDITS,
    GEOMETRY_EDITS,
    LOOK_EDITS,
    NUM_VIEWS,
    draw_group,
    draw_kind,
    draw_pair,
    load_edit_groups,
    render_edit_groups,
    save_edit_groups,
)
from custom.fourd.world.edits import is_held_out_edit, parse_instruction
from custom.fourd.world.render import composite_layers


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def groups():
    g = generator()
    return [render_edit_groups(8, count, g, size_px=8) for count in (1, 2)]


def pairs(groups, count, views=slice(0, 1), looks=LOOK_EDITS):
    g, white = generator(5), torch.ones(3)
    for number in range(count):
        part = groups[number % 2]
        index = number // 2 % len(part.before)
        yield part, index, draw_pair(part, index, views, white, g, looks)


def test_sentences_mean_the_edit_that_the_images_show(groups):
    words, kinds = set(vocabulary()), set()
    for _, _, pair in pairs(groups, 160):
        instruction = parse_instruction(pair.instruction)
        assert pair.after in instruction.answers(pair.before), pair.instruction
        assert set(pair.instruction.split()) <= words
        assert not is_held_out_edit(pair.before, pair.after)
        assert not pair.after.scene.has_held_out_motion
        kinds |= {key for key, value in vars(instruction).items() if value is not None}
        kinds.add(instruction.random)
    assert {"shape", "colour", "size", "material", "style", "texture", "palette"} <= kinds


def test_images_are_composed_of_the_right_layers(groups):
    """By the renderer's own compositing of the layers that the scenes' geometry belongs to."""

    def image(layers, scene):
        cover, shade = (layers.float() / 255).unbind(1)
        return composite_layers(scene, cover, shade, torch.ones(3))[0].permute(0, 3, 1, 2)

    def geometry(scene):
        return [(o.shape, o.size, o.material, o.motion) for o in scene.objects]

    changed = 0
    for part, index, pair in pairs(groups, 60, slice(0, NUM_VIEWS)):
        before, after = part.layers[index].unbind(1)
        torch.testing.assert_close((pair.images + 1) / 2, image(before, pair.before))
        differs = geometry(pair.after.scene) != geometry(pair.before)
        changed += differs
        if differs:
            assert geometry(pair.after.scene) == geometry(part.after[index])
        expected = image(after if differs else before, pair.after.scene)
        expected = pair.after.styled(expected.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close((pair.edited + 1) / 2, expected)
    assert changed > 10


def test_groups_differ_in_one_thing_of_one_object():
    g = generator(3)
    seen = set()
    for number in range(60):
        before, after = draw_group(g, 1 + number % 2)
        changes = [
            kind
            for old, new in zip(before.objects, after.objects, strict=True)
            for kind in ("shape", "colour", "size", "material", "motion")
            if getattr(old, kind) != getattr(new, kind)
        ]
        assert len(changes) <= 1 and before.relation == after.relation
        assert not before.has_held_out_motion
        seen |= set(changes or ["none"])
    assert seen == {kind for kind, _ in GEOMETRY_EDITS}


@pytest.mark.parametrize("shares", [GEOMETRY_EDITS, LOOK_EDITS, ANCHORED_LOOK_EDITS])
def test_kinds_come_in_their_shares(shares):
    assert sum(share for _, share in shares) == pytest.approx(1.0)
    g = generator(1)
    drawn = [draw_kind(g, shares) for _ in range(400)]
    for kind, share in shares:
        assert drawn.count(kind) / 400 == pytest.approx(share, abs=0.08)


def test_frames_with_an_anchor_see_edits_of_several_answers_twice_as_often(groups):
    def share(looks):
        told = [pair.instruction for _, _, pair in pairs(groups, 200, looks=looks)]
        return sum(" random " in sentence for sentence in told) / 200

    assert share(ANCHORED_LOOK_EDITS) > 1.5 * share(LOOK_EDITS) > 0.1


def test_groups_survive_the_disk(groups, tmp_path):
    save_edit_groups(groups[1], tmp_path / "e.pt")
    loaded = load_edit_groups(tmp_path / "e.pt")
    assert loaded.before == groups[1].before and loaded.after == groups[1].after
    assert torch.equal(loaded.layers, groups[1].layers)
