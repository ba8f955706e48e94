"""Pairs of images of moving scenes, from a 4D renderer: `fourd-pair-datamodule`.

What a time or view control learns from: frame i by camera a is shown, frame j by camera b is to be
made. Pairs of one video are what an implicit-motion codec learns from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import threestudio
import torch
from omegaconf import DictConfig
from threestudio.data.camera_config import plain_list, validate_count, validate_number
from threestudio.data.camera_sampling import ItemSpan
from threestudio.utils.config import parse_structured
from torch.utils.data import DataLoader, Dataset

from .batch_places import BatchPlaces
from .frame_encoders import KINDS_OF_FEATURES, features_identity, latents_identity
from .grid_cache import open_cache
from .grid_cells import GridCells
from .pair_batch import (
    RANDOM_BACKGROUNDS,
    WHITE,
    draw_backgrounds,
    draw_jitter,
    pair_batch,
    scoring_background,
)
from .pair_cells import CellMemory, CellSource
from .pair_sampling import KINDS, PairChoice, PairSampler
from .pair_scenes import open_scenes
from .pair_split import PROTOCOLS, SplitOptions, scored_pairs, split_cells, union
from .video_cells import FITS
from .video_scene_datamodule import plain


def _published_mix() -> dict[str, float]:
    return {"time": 0.35, "view": 0.35, "both": 0.25, "identity": 0.05}


@dataclass
class FourdPairDataModuleConfig:
    """Keys of `fourd-pair-datamodule`."""

    scenes: Any = field(default_factory=list)
    """what to draw from, each a text or a mapping: a caption of the world, a checkpoint or scene
    file, a folder of `render_grid`, a video or a folder of pictures; see `pair_scenes`"""
    height: int = 64
    """of the images, in pixels; a grid must have it"""
    width: int = 64
    """of the images, in pixels; a grid must have it"""
    batch_size: int = 8
    """pairs per batch and process"""
    mix: dict = field(default_factory=_published_mix)
    """weights of the kinds of pair: time, view, both, identity; a scene without other times or
    views has those it can show, in the same ratio"""
    single_image_share: float = 0.0
    """share of the pairs, in [0, 1], that are one picture twice: of the scenes that are a single
    picture where there are any, else of any"""
    even_distances: bool = False
    """false: every ordered pair of times (views) is as likely as any other; true: every distance
    is. A step is spread evenly over the distances either way"""
    n_times: int = 16
    """scene times of the world and of trained scenes"""
    include_last_time: bool = False
    """false: times k / n_times, since a motion that loops shows its first frame again at time 1;
    true: k / (n_times - 1)"""
    n_azimuths: int = 16
    """cameras of the world and of trained scenes, evenly around the scene from azimuth 0"""
    elevations_deg: Any = 15.0
    """their heights over the horizon, degrees: a number, or a list with every azimuth at each"""
    camera_distance: float = 3.0
    """their distance from the origin, scene units; with fovy_deg and the first of elevations_deg
    also what is said of the standing camera of a video"""
    fovy_deg: float = 40.0
    """their vertical field of view, degrees"""
    fit: str = "crop"
    """how frames of a video of another shape become height x width: "crop" cuts the middle out,
    "pad" adds transparent margins"""
    train_every_time: int = 2
    """train on every so many-th time, hold the others out; 1 holds none out"""
    hold_out_azimuth_every: int = 4
    """hold the middle one of so many neighbouring azimuths out; 0 holds none out"""
    background: Any = WHITE
    """colour in [0, 1] behind both frames of a pair, "random" or "random_gray" (white where pairs
    are scored)"""
    colour_jitter: float = 0.04
    """training changes brightness, contrast, saturation and hue by up to so much, alike in both
    frames of a pair"""
    latents: str | None = None
    """model whose latents `render_grid` cached, as "target_latents"; null gives none"""
    cond_features: str | None = None
    """model whose vision features `render_grid` cached, as "cond_features"; null gives none"""
    cond_features_kind: str = "plus"
    """kind of IP-Adapter that they are for: plus or base"""
    cond_features_folder: str = "image_encoder"
    """where in that model the vision encoder is, such as models/image_encoder"""
    revision: str | None = None
    """commit of the models of latents and cond_features, where they are hub ids"""
    cache_mib: float = 256.0
    """rendered images are remembered up to so many MiB in each process"""
    eval_batch_size: int = 1
    """pairs per batch of validation and test"""
    n_val_pairs: int = 2
    """scored pairs of validation, per scene and protocol; 0 for all"""
    n_test_pairs: int = 16
    """scored pairs of the test, per scene and protocol; 0 for all"""
    min_time_gap: float = 0.25
    """scored pairs whose time varies do so by at least this much of the clip: 4 frames of 16"""
    min_angle_deg: float = 45.0
    """scored pairs whose view varies do so by at least this, in azimuth or elevation, degrees"""


class PairDataset(BatchPlaces):
    """An endless stream of batches of pairs, from the trainer's step on; see `collate`."""

    def __init__(self, cfg: Any, sources: list[CellSource], sampler: PairSampler) -> None:
        super().__init__()
        self.cfg, self.sources, self.sampler = cfg, sources, sampler
        self.memory = CellMemory(int(cfg.cache_mib * 2**20))

    def collate(self, place: dict[str, int]) -> dict[str, Any]:
        """Return the pairs of a place, a pure function of the seed and of it.

        Random: see `PairSampler.draw`, `draw_backgrounds` and `draw_jitter`.
        """
        size = self.cfg.batch_size
        span = ItemSpan(place["step"], self.shard(place) * size, size, self.n_shards * size)
        backgrounds = draw_backgrounds(plain(self.cfg.background), span)
        strength = self.cfg.colour_jitter
        jitter = draw_jitter(strength, span) if strength else None
        choice = self.sampler.draw(span)
        batch = pair_batch(self.sources, self.memory, choice, backgrounds, jitter)
        return batch | {"step": place["step"]}


class ScoredPairDataset(Dataset):
    """Pairs to score, by place; no draw, no jitter.

    Args:
        cfg: keys of the data module. sources: scenes. choice: which pairs, in order.
    """

    def __init__(self, cfg: Any, sources: list[CellSource], choice: PairChoice) -> None:
        self.cfg, self.sources, self.choice = cfg, sources, choice
        self.memory = CellMemory(int(cfg.cache_mib * 2**20))

    def __len__(self) -> int:
        return len(self.choice)

    def __getitem__(self, index: int) -> int:
        """Return the place itself; `collate` makes the batch."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}; expected 0 to {len(self) - 1}.")
        return index

    def collate(self, places: list[int]) -> dict[str, Any]:
        """Return pairs with "index" [B], their places in this dataset."""
        rows = torch.tensor(places, dtype=torch.long)
        choice = PairChoice(*(column[rows] for column in vars(self.choice).values()))
        backgrounds = scoring_background(plain(self.cfg.background)).expand(len(rows), 3)
        return pair_batch(self.sources, self.memory, choice, backgrounds) | {"index": rows}


@threestudio.register("fourd-pair-datamodule")
class FourdPairDataModule(pl.LightningDataModule):
    """Pairs of images of moving scenes: at random to train, unseen ones to score.

    A batch of B pairs holds
        "cond_rgb", "target_rgb" [B H W 3] in [0, 1] and "cond_alpha", "target_alpha" [B H W 1];
        "time_i", "time_j" [B] in [0, 1] and "delta_time" = time_j - time_i, signed;
        "camera_a", "camera_b": mappings of "c2w" [B 4 4], "fovy" [B] in radians, "elevation" and
        "azimuth" [B] in degrees, as in the contract's batches, "radius" [B] in scene units;
        "delta_view" [B 3]: the differences of elevation and azimuth in radians, the latter in
        (-pi, pi], and the logarithm of the radii's ratio, b against a;
        "scene_id", "caption": lists of B texts;
        "index_i", "index_j", "index_a", "index_b", "scene_index" [B], places of frames, cameras
        and scenes; "pair_kind" [B], places in `KINDS`; "background" [B 3];
        where they are asked for and cached, "target_latents" and "cond_features";
        "step" in training; "index" in validation and test.

    Validation and test give three protocols, told by "pair_kind": fixed view and varying time,
    varying view and fixed time, both varying. They show a cell of the training's and ask for an
    unseen one that is at least `min_time_gap` or `min_angle_deg` away, in both where both vary.

    Memory: `cache_mib` of rendered images for training and as much for scoring, the trained scenes
    themselves, and one batch. Grids and long videos are memory-mapped.

    Args:
        cfg: the keys of `Config`.

    Raises:
        TypeError: for an unknown key.
        ValueError: for a value or a file that cannot work, naming it. Trained scenes and videos
            are read in `setup`, where those that are broken are refused.
    """

    Config = FourdPairDataModuleConfig

    def __init__(self, cfg: dict | DictConfig | None = None) -> None:
        super().__init__()
        self.cfg = parse_structured(self.Config, {} if cfg is None else cfg)
        self.validate_config()
        self.sources = open_scenes(plain(self.cfg.scenes), self.cfg)
        self._open_caches()

    def validate_config(self) -> None:
        """Raise ValueError where a key has a value that cannot work."""
        cfg = self.cfg
        counts = "height width batch_size n_times n_azimuths train_every_time eval_batch_size"
        for key in counts.split():
            validate_count(getattr(cfg, key), f"data.{key}", 1)
        for key in ("hold_out_azimuth_every", "n_val_pairs", "n_test_pairs"):
            validate_count(getattr(cfg, key), f"data.{key}", 0)
        if cfg.hold_out_azimuth_every == 1:
            raise ValueError("data.hold_out_azimuth_every is 1; expected 0, or 2 and more.")
        for elevation in plain_list(plain(cfg.elevations_deg)):
            validate_number(elevation, "data.elevations_deg", -90, 90)
        validate_number(cfg.camera_distance, "data.camera_distance", 0, open_low=True)
        validate_number(cfg.fovy_deg, "data.fovy_deg", 0, 180, open_low=True, open_high=True)
        validate_number(cfg.single_image_share, "data.single_image_share", 0, 1)
        validate_number(cfg.colour_jitter, "data.colour_jitter", 0, 0.5)
        validate_number(cfg.cache_mib, "data.cache_mib", 0)
        validate_number(cfg.min_time_gap, "data.min_time_gap", 0, 1)
        validate_number(cfg.min_angle_deg, "data.min_angle_deg", 0, 180)
        if cfg.fit not in FITS:
            raise ValueError(f"data.fit is {cfg.fit!r}; expected one of {', '.join(FITS)}.")
        if cfg.cond_features_kind not in KINDS_OF_FEATURES:
            raise ValueError(
                f"data.cond_features_kind is {cfg.cond_features_kind!r}; expected one of "
                f"{', '.join(KINDS_OF_FEATURES)}."
            )
        self._validate_mix()
        self._validate_background()

    def _validate_mix(self) -> None:
        mix = plain(self.cfg.mix)
        unknown = [kind for kind in mix if kind not in KINDS[:4]]
        if unknown:
            raise ValueError(
                f"data.mix names {unknown[0]!r}; expected weights of {', '.join(KINDS[:4])}."
            )
        for kind, weight in mix.items():
            validate_number(weight, f"data.mix.{kind}", 0)
        self.mix = {kind: float(mix.get(kind, 0.0)) for kind in KINDS[:4]}
        if sum(self.mix.values()) <= 0:
            raise ValueError(f"data.mix is {mix}; expected at least one weight above 0.")

    def _validate_background(self) -> None:
        background = plain(self.cfg.background)
        if background in RANDOM_BACKGROUNDS:
            return
        if not isinstance(background, (list, tuple)) or len(background) != 3:
            raise ValueError(
                f"data.background is {background!r}; expected three numbers in [0, 1], or one of "
                f"{', '.join(RANDOM_BACKGROUNDS)}."
            )
        for value in background:
            validate_number(value, "data.background", 0, 1)

    def _open_caches(self) -> None:
        """Take latents and features of disk into use, if they are asked for and still hold."""
        cfg = self.cfg
        asked = [key for key in ("latents", "cond_features") if getattr(cfg, key) is not None]
        if not asked:
            return
        background = plain(cfg.background)
        if cfg.colour_jitter or background in RANDOM_BACKGROUNDS:
            raise ValueError(
                f"data.{asked[0]} was made of images of one background without jitter, and "
                f"data.colour_jitter is {cfg.colour_jitter} and data.background {background!r}; "
                "expected colour_jitter 0 and the background of render_grid."
            )
        known = {
            "latents": lambda: latents_identity(cfg.latents, cfg.revision),
            "cond_features": lambda: features_identity(
                cfg.cond_features, cfg.cond_features_kind, cfg.revision, cfg.cond_features_folder
            ),
        }
        identities = {key: known[key]() for key in asked}
        for source in self.sources:
            if not isinstance(source, GridCells):
                raise ValueError(
                    f"data.{asked[0]} is cached beside grids, and the scene {source.scene_id!r} is "
                    f"none; render it with render_grid, or set data.{asked[0]} to null."
                )
            rows = {key: open_cache(source, made, background) for key, made in identities.items()}
            source.use_caches(rows.get("latents"), rows.get("cond_features"))

    def setup(self, stage: str | None = None) -> None:
        """Build the datasets of a stage: "fit", "validate", "test", "predict", or None for all."""
        for source in self.sources:
            if not source.is_prepared:
                source.prepare()
        options = self.split_options()
        splits = [split_cells(source, options) for source in self.sources]
        if stage in (None, "fit"):
            cells = [
                split.train_cells(source.cameras, options.even_distances)
                for source, split in zip(self.sources, splits, strict=True)
            ]
            sampler = PairSampler(cells, self.mix, self.cfg.single_image_share)
            self.train_dataset = PairDataset(self.cfg, self.sources, sampler)
        for name, stages, count in (
            ("val_dataset", ("fit", "validate"), self.cfg.n_val_pairs),
            ("test_dataset", ("test", "predict"), self.cfg.n_test_pairs),
        ):
            if stage is None or stage in stages:
                choice = self._scored(splits, options, count, required=stage not in (None, "fit"))
                setattr(self, name, ScoredPairDataset(self.cfg, self.sources, choice))

    def split_options(self) -> SplitOptions:
        """Return how scenes are split into what is trained on and what is scored."""
        cfg = self.cfg
        return SplitOptions(
            train_every_time=cfg.train_every_time,
            hold_out_azimuth_every=cfg.hold_out_azimuth_every,
            min_time_gap=cfg.min_time_gap,
            min_angle_deg=cfg.min_angle_deg,
            even_distances=cfg.even_distances,
        )

    def _scored(self, splits: list, options: SplitOptions, n: int, required: bool) -> PairChoice:
        places = enumerate(zip(self.sources, splits, strict=True))
        choice = union([
            scored_pairs(source, split, options, place, protocol, n)
            for place, (source, split) in places
            for protocol in PROTOCOLS
        ])  # fmt: skip
        if len(choice) == 0:
            reason = (
                "no cell of the scenes is unseen and far enough from a trained one: "
                f"train_every_time is {options.train_every_time}, hold_out_azimuth_every "
                f"{options.hold_out_azimuth_every}, min_time_gap {options.min_time_gap} and "
                f"min_angle_deg {options.min_angle_deg}. Hold times or azimuths out, or lower the "
                "gaps."
            )
            if required:
                raise ValueError(reason)
            threestudio.warn("There is nothing to score: %s", reason)
        return choice

    def train_dataloader(self) -> DataLoader:
        """Return the training loader, which continues at the trainer's step."""
        self.train_dataset.attach_trainer(self.trainer)
        collate = self.train_dataset.collate
        return DataLoader(self.train_dataset, num_workers=0, batch_size=None, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        """Return the loader of some unseen pairs of each protocol."""
        return self._scored_loader(self.val_dataset)

    def test_dataloader(self) -> DataLoader:
        """Return the loader of the test's unseen pairs, protocol after protocol in each scene."""
        return self._scored_loader(self.test_dataset)

    def predict_dataloader(self) -> DataLoader:
        """Return the loader that export walks over, which is that of the test."""
        return self.test_dataloader()

    def _scored_loader(self, dataset: ScoredPairDataset) -> DataLoader:
        size = self.cfg.eval_batch_size
        return DataLoader(dataset, size, num_workers=0, collate_fn=dataset.collate)
