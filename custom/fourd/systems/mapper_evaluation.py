"""Validation and test of time and view control: images against the renders that they stand for.

The test scores unseen pairs of three protocols (fixed view and varying time, varying view and fixed
time, both), ours beside baselines; finds the time and the view that images show; asks for nothing
(the identity cell) and for turned signs; and writes grids of time x view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import threestudio
import torch
from jaxtyping import Float
from threestudio.utils.misc import get_rank
from torch import Tensor
from torch.nn import functional

from custom.fourd.data.pair_batch import scoring_background
from custom.fourd.data.pair_cells import CellMemory
from custom.fourd.data.pair_split import split_cells
from custom.fourd.data.video_scene_datamodule import plain
from custom.fourd.metrics.control_accuracy import PIXEL_SPACE, pixel_features

from .mapper_evaluation_options import ABSENT, evaluation_options
from .mapper_grid import GridOptions, check_options, planned_grids
from .mapper_grid_writer import GridWriter
from .mapper_oracle import oracle_images
from .mapper_probes import identity_figures, reversal_figures, time_probes, view_probes
from .mapper_scores import PairScores, spread
from .mapper_setup import checked_keys
from .mapper_truth import SceneTruth

SHEET_COLUMNS = 8


class MapperEvaluation:
    """Mixin of `MapperTraining` with what it does outside of training.

    Uses of the system: `steering`, `generate`, `save_mappers`, the savers, its clock.
    """

    def configure_evaluation(self) -> None:
        """Read the options, so that what cannot work is refused before anything is loaded."""
        grid = checked_keys(GridOptions, plain(self.cfg.grid) or {}, "system.grid")
        self.grid_options = check_options(grid)
        self.evaluation_options = evaluation_options(self.cfg.evaluation)
        if self.evaluation_options.features == "vision" and not self.cfg.ip_adapter:
            raise ValueError(
                "system.evaluation.features is 'vision', and system.ip_adapter is null; expected "
                "one, whose vision encoder compares the images. Set features=pixels without."
            )

    # Validation

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Generate the targets of a batch for the picture of this validation."""
        self._validated = getattr(self, "_validated", None) or PairScores()
        self._validated.add(self.generate(batch, self._starting_noise(batch)), batch)

    def on_validation_epoch_end(self) -> None:
        """Write `it{N}-0.png`: columns of pairs, rows of condition, truth and generated image."""
        scores, self._validated = getattr(self, "_validated", None), None
        if scores is None or get_rank() != 0:
            return
        step = self.true_global_step
        self.save_image_grid(
            f"it{step}-0.png", _rows(scores.shown), name="validation_step", step=step
        )
        for kind, figures in scores.summary().items():
            self.log(f"val/psnr_{kind}", figures["psnr"])

    # Test

    def on_test_start(self) -> None:
        """Begin to collect figures."""
        self._stop_clock()
        self._tested, self._oracle_left = PairScores(), {}
        data = self.trainer.datamodule
        background = scoring_background(plain(data.cfg.background))
        memory = CellMemory(int(data.cfg.cache_mib * 2**20))
        self._truths = [
            SceneTruth(source, background, self._features, memory) for source in data.sources
        ]

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Generate the targets of a batch, by us and by baselines; compare with the truth."""
        if self.grid_options.image is not None:
            return  # A picture of the user's; the scenes of the config are not what is tested.
        for method, images in self._methods(batch).items():
            self._tested.add(images, batch, method)
            self._tested.follow(images, batch, self._truths, method)
        if "oracle" in self.evaluation_options.baselines:
            self._score_oracle(batch)

    def _methods(self, batch: dict[str, Any]) -> dict[str, Float[Tensor, "b h w 3"]]:
        noise, sample = self._starting_noise(batch), self.steering.sample
        baselines: dict[str, Callable[[], Tensor]] = {
            "copy": lambda: batch["cond_rgb"],
            "image_only": lambda: sample(batch, noise, with_control=False),
            "control_only": lambda: sample(batch, noise, with_image=False),
        }
        chosen = [n for n in self.evaluation_options.baselines if n in baselines]
        if self.model.adapter_kind is None:
            # Ours is control alone there, and no control is no condition at all.
            chosen = [name for name in chosen if name == "copy"]
        return {"ours": self.generate(batch, noise)} | {name: baselines[name]() for name in chosen}

    def _score_oracle(self, batch: dict[str, Any]) -> None:
        """Fit tokens to the first targets of each kind, up to the options' number."""
        options, rows = self.evaluation_options.oracle, []
        for row, kind in enumerate(batch["pair_kind"].tolist()):
            done = self._oracle_left.get(kind, 0)
            if done < options.pairs:
                self._oracle_left[kind] = done + 1
                rows.append(row)
        if not rows:
            return
        part = rows_of(batch, rows)
        with torch.inference_mode(False), torch.enable_grad():
            images = oracle_images(self.steering, part, self._starting_noise(part), options)
        self._tested.add(images, part, "oracle")
        self._tested.follow(images, part, self._truths, "oracle")

    def on_test_epoch_end(self) -> None:
        """Write grids, the contact sheet and `metrics.json`."""
        if get_rank() != 0:
            return
        grids = self._write_grids()
        if self.grid_options.image is not None:
            return
        step, shown = self.true_global_step, self._tested.shown
        self.save_image_grid(
            f"it{step}-test-sheet.png",
            _rows(spread(shown, SHEET_COLUMNS)),
            name="contact_sheet",
            step=step,
        )
        protocols = self._tested.summary()
        metrics = {
            "protocols": protocols,
            "control": self._tested.control(),
            **self._probe(),
            "grids": grids,
            "baselines": list(self.evaluation_options.baselines),
            "compose": self.model.composition.mode,
            "feature_space": PIXEL_SPACE
            if self.evaluation_options.features == "pixels"
            else "pooled features of the vision encoder",
            "absent": ABSENT,
            "steps": step,
            "seconds": self.training_seconds,
            "profile": self.profile,
        }
        self.save_json("metrics.json", metrics)
        self._tell(metrics)

    def _write_grids(self) -> list[dict[str, Any]]:
        options = self.grid_options
        if not options.n_times or not options.n_views:
            return []
        writer = GridWriter(self, self.steering, options)
        cfg, found = self.trainer.datamodule.cfg, []
        for plan in planned_grids(options, self._truths, cfg, self.steering):
            found += writer.write(plan)
        if found:
            threestudio.info("grids of time x view are in %s/%s", self.get_save_dir(),
                             writer.folder)  # fmt: skip
        return found

    def _probe(self) -> dict[str, Any]:
        """The identity cell, and signs of time and view turned."""
        options, data = self.evaluation_options, self.trainer.datamodule
        steering, size = self.steering, self.grid_options.batch_size
        splits = [split_cells(source, data.split_options()) for source in data.sources]

        def generate(batch: dict[str, Any]) -> Tensor:
            made = []
            for first in range(0, len(batch["caption"]), size):
                rows = list(range(first, min(first + size, len(batch["caption"]))))
                part = rows_of(batch, rows)
                made.append(self.generate(part, self._starting_noise(part)))
            return torch.cat(made)

        cells = [
            list(zip(spread(split.train_times, options.n_identity),
                     spread(split.train_cameras, options.n_identity)))
            for split in splits
        ]  # fmt: skip
        pairs = list(zip(self._truths, splits, strict=True))
        found = {"identity": identity_figures(self._truths, cells, generate), "reversal": {}}
        count = options.n_reversals
        if steering.follows_time:
            probes = [time_probes(t, spread(s.train_cameras, count), count) for t, s in pairs]
            found["reversal"]["time"] = reversal_figures(self._truths, probes, generate)
        if steering.follows_view:
            least = float(data.cfg.min_angle_deg)
            probes = [view_probes(t, spread(s.train_times, count), count, least) for t, s in pairs]
            found["reversal"]["view"] = reversal_figures(self._truths, probes, generate)
        return found

    def _tell(self, metrics: dict[str, Any]) -> None:
        for kind, figures in metrics["protocols"].items():
            threestudio.info(
                "%s: PSNR %.2f dB over %d pairs; the source left as it is has %s",
                kind, figures["psnr"], figures["pairs"], _number(figures.get("copy_psnr"), "dB"),
            )  # fmt: skip
        control, identity = metrics["control"], metrics["identity"] or {}
        turned = {k: (v or {}).get("correlation") for k, v in metrics["reversal"].items()}
        threestudio.info(
            "time is off by %s, azimuth by %s; turning the sign of time follows the truth by %s, "
            "of view by %s; no change is %s from the source",
            _number(control.get("time_error_frames"), "frames"),
            _number(control.get("angle_error_deg"), "degrees"),
            _number(turned.get("time")), _number(turned.get("view")),
            _number(identity.get("psnr"), "dB"),
        )  # fmt: skip

    def on_fit_end(self) -> None:
        """Write the mappers beside the pictures, unless this very step's are there already."""
        super().on_fit_end()
        if get_rank() != 0 or self._save_dir is None:
            return
        try:
            written = self.save_mappers(self.get_save_dir())
        except FileExistsError as error:
            threestudio.info("the mappers of this step are kept as they are: %s", error)
            return
        threestudio.info("wrote %s", ", ".join(str(path) for path in written))

    def _features(self, rgb: Float[Tensor, "n h w 3"]) -> Float[Tensor, "n f"]:
        if self.evaluation_options.features == "pixels":
            return pixel_features(rgb)
        return functional.normalize(self.model.pooled_features(rgb.to(self.model.device)), dim=-1)

    def _starting_noise(self, batch: dict[str, Any]) -> Float[Tensor, "b c lh lw"]:
        """The same noise for every pair, so that images differ by their controls alone."""
        noise = self.steering.noise(batch["cond_rgb"], self.grid_options.seed)
        return noise.expand(len(batch["cond_rgb"]), *noise.shape[1:])


def rows_of(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some rows of a batch of the pair source."""
    found: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, Tensor):
            found[key] = value[rows] if value.ndim else value
        elif isinstance(value, dict):
            found[key] = rows_of(value, rows)
        elif isinstance(value, list):
            found[key] = [value[row] for row in rows]
        else:
            found[key] = value
    return found


def _number(value: float | None, unit: str = "") -> str:
    return "unknown" if value is None else f"{value:.2f} {unit}".strip()


def _rows(shown: list[tuple[Tensor, Tensor, Tensor]]) -> list[list[dict]]:
    rgb = {"type": "rgb", "kwargs": {"data_format": "HWC"}}
    return [[{**rgb, "img": pair[place]} for pair in shown] for place in range(3)]
