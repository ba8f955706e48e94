"""Backgrounds: colours, the random replacement and its sharing, evaluation."""

import pytest
import threestudio
import torch
import torch.nn.functional as F
from threestudio.models.background.base import BaseBackground, background_of_batch


def directions(batch_size=6, size=2):
    stream = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(batch_size, size, size, 3, generator=stream), dim=-1)


def build(name, **config):
    torch.manual_seed(0)
    return threestudio.find(name)(config).train()


def images_at(background, steps, batch_size=6):
    """Colour of pixel (0, 0) of each image at each step."""
    rows = []
    for step in steps:
        background.do_update_step(0, step)
        output = background(directions(batch_size))
        assert torch.equal(output, output[:, :1, :1].expand_as(output)) or not background.training
        rows.append(output[:, 0, 0])
    return torch.stack(rows).detach()


class TestSolid:
    name = "solid-color-background"

    def test_color(self):
        output = build(self.name, color=[0.2, 0.4, 0.6])(directions())
        assert torch.equal(output, torch.tensor([0.2, 0.4, 0.6]).expand(6, 2, 2, 3))

    def test_learned_color_trains_and_fixed_one_does_not(self):
        learned = build(self.name, learned=True)
        learned(directions()).sum().backward()
        assert learned.env_color.grad.tolist() == [24.0] * 3
        fixed = build(self.name)
        assert not list(fixed.parameters()) and "env_color" in fixed.state_dict()

    def test_wrong_number_of_channels(self):
        with pytest.raises(ValueError, match="color has 3 values; expected n_output_dims = 4"):
            build(self.name, n_output_dims=4)
        with pytest.raises(ValueError, match="eval_color has 3 values; expected n_output_dims = 1"):
            build(self.name, n_output_dims=1, color=[0.1], eval_color=[1, 1, 1])


class TestAugmentation:
    name = "solid-color-background"

    def test_probability_zero_one_and_half(self):
        white = torch.ones(3)
        for probability, low, high in ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.4, 0.6)):
            background = build(self.name, random_aug=True, random_aug_prob=probability)
            replaced = (images_at(background, range(60)) != white).any(-1).float().mean()
            assert low <= replaced <= high

    def test_per_image_by_default_and_grey_on_request(self):
        colors = images_at(build(self.name, random_aug=True, random_aug_prob=1.0), [4])[0]
        assert colors.unique(dim=0).shape[0] == 6
        assert not torch.equal(colors[:, 0], colors[:, 1])
        config = {"random_aug": True, "random_aug_prob": 1.0, "random_aug_gray": True}
        greys = images_at(build(self.name, **config), range(30)).view(-1, 3)
        assert torch.equal(greys[:, 0], greys[:, 1]) and torch.equal(greys[:, 0], greys[:, 2])
        assert greys.min() >= 0 and greys.max() < 1 and greys.mean().item() == pytest.approx(
            0.5, abs=0.1
        )

    @pytest.mark.parametrize("key", ["share_aug_bg", "share_aug"])
    def test_shared_by_the_batch(self, key):
        background = build(self.name, random_aug=True, **{key: True})
        colors = images_at(background, range(40))
        assert torch.equal(colors, colors[:, :1].expand_as(colors))
        assert colors[:, 0].unique(dim=0).shape[0] > 10  # steps differ

    def test_shared_by_a_group_of_views(self):
        config = {"random_aug": True, "random_aug_prob": 1.0, "share_aug_bg": True}
        colors = images_at(build(self.name, aug_group_size=4, **config), [2], batch_size=8)[0]
        assert torch.equal(colors[:4], colors[:1].expand(4, -1))
        assert torch.equal(colors[4:], colors[4:5].expand(4, -1))
        assert not torch.equal(colors[0], colors[4])

    def test_the_step_decides_and_nothing_else(self):
        background = build(self.name, random_aug=True)
        first = images_at(background, [9])
        torch.manual_seed(77)
        images_at(background, [1, 2, 3])
        assert torch.equal(first, images_at(background, [9]))

    def test_a_second_rank_draws_the_next_images(self, monkeypatch):
        whole = images_at(build(self.name, random_aug=True), [5], batch_size=6)[0]
        monkeypatch.setattr("threestudio.models.background.base.get_rank", lambda: 1)
        second = images_at(build(self.name, random_aug=True), [5], batch_size=3)[0]
        assert torch.equal(second, whole[3:])

    def test_never_in_evaluation(self):
        background = build(self.name, random_aug=True, random_aug_prob=1.0).eval()
        assert torch.equal(images_at(background, range(5)), torch.ones(5, 6, 3))

    def test_replaced_images_give_no_gradient(self):
        background = build(self.name, learned=True, random_aug=True, random_aug_prob=1.0)
        background(directions()).sum().backward()
        assert background.env_color.grad.tolist() == [0.0] * 3


class TestEnvironmentMap:
    name = "neural-environment-map-background"

    def test_depends_on_direction_within_the_unit_range(self):
        background = build(self.name)
        output = background(directions(3, 4))
        assert output.shape == (3, 4, 4, 3)
        assert output.min() >= 0 and output.max() <= 1 and output.std() > 0
        again = background(directions(3, 4).flip(0)).flip(0)
        assert torch.allclose(output, again, atol=1e-6)

    def test_latent_channels_and_gradients(self):
        background = build(self.name, n_output_dims=4, color_activation="none")
        output = background(directions())
        assert output.shape[-1] == 4
        output.square().sum().backward()
        assert all(parameter.grad is not None for parameter in background.parameters())

    def test_eval_color_only_in_evaluation(self):
        background = build(self.name, eval_color=[1.0, 0.5, 0.0])
        assert not torch.equal(background(directions())[0, 0, 0], torch.tensor([1.0, 0.5, 0.0]))
        output = background.eval()(directions())
        assert torch.equal(output, torch.tensor([1.0, 0.5, 0.0]).expand(6, 2, 2, 3))

    def test_augmentation_replaces_whole_images(self):
        background = build(self.name, random_aug=True, random_aug_prob=1.0)
        output = background(directions())
        assert torch.equal(output, output[:, :1, :1].expand_as(output))


def test_the_alias_of_upstreams_extension():
    alias = threestudio.find("mvdream-neural-environment-map-background")
    assert alias is threestudio.find("neural-environment-map-background")


class TestGroupsOfABatch:
    """The batch says which images belong together; frames of a clip always share their colour."""

    @pytest.fixture(params=["solid-color-background", "neural-environment-map-background"])
    def name(self, request):
        return request.param

    def colors(self, name, step=2, batch_size=8, config=None, **batch):
        background = build(name, random_aug=True, random_aug_prob=1.0, **(config or {}))
        background.do_update_step(0, step)
        return background_of_batch(background, directions(batch_size), batch)[:, 0, 0].detach()

    def test_one_color_per_clip_whatever_the_config_says(self, name):
        clips = self.colors(name, is_video=True, images_per_group=4)
        assert torch.equal(clips, clips[[0, 0, 0, 0, 4, 4, 4, 4]])
        assert not torch.equal(clips[0], clips[4])
        images = self.colors(name, is_video=False, images_per_group=4)
        assert images.unique(dim=0).shape[0] == 8

    def test_the_coin_is_one_per_clip_too(self, name):
        for step in range(12):
            config = {"random_aug_prob": 0.5}
            background = build(name, random_aug=True, **config)
            background.do_update_step(0, step)
            dirs = directions(1).expand(4, -1, -1, -1)
            clip = background(dirs, images_per_group=4, is_video=True)
            assert torch.equal(clip, clip[:1].expand_as(clip))

    def test_view_groups_share_where_asked(self, name):
        groups = self.colors(name, config={"share_aug_bg": True}, images_per_group=4)
        assert torch.equal(groups, groups[[0, 0, 0, 0, 4, 4, 4, 4]])
        assert not torch.equal(groups[0], groups[4])

    def test_two_ranks_draw_the_groups_of_one(self, name, monkeypatch):
        shared = {"config": {"share_aug_bg": True}, "images_per_group": 4}
        whole = self.colors(name, **shared)
        monkeypatch.setattr("threestudio.models.background.base.get_rank", lambda: 1)
        second = self.colors(name, batch_size=4, **shared)
        assert torch.equal(second, whole[4:])

    def test_a_foreign_background_is_asked_for_directions_alone(self):
        class Foreign(BaseBackground):
            def forward(self, dirs):
                return dirs

        rays = directions()
        found = background_of_batch(Foreign({}), rays, {"is_video": True, "images_per_group": 3})
        assert torch.equal(found, rays)
