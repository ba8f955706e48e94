"""How a system exports: the exporter, its views, and a folder of its own for its files."""

import itertools
import os

import threestudio
from threestudio.models.exporters.base import Exporter
from threestudio.utils.misc import get_rank


class ExportRun:
    """Mixin of `BaseLift3DSystem`: Lightning's prediction is the export."""

    def on_predict_start(self) -> None:
        """Build the exporter."""
        self.exporter = threestudio.find(self.cfg.exporter_type)(
            self.cfg.exporter,
            geometry=self.geometry,
            material=self.material,
            background=self.background,
        )
        if isinstance(self.exporter, Exporter):
            self.exporter.attach(self)

    def predict_step(self, batch: dict, batch_idx: int) -> None:
        """Show the view to the exporter; render it, if the exporter asks for a video."""
        if isinstance(self.exporter, Exporter):
            self.exporter.see_view(batch)
        if self.exporter.cfg.save_video:
            self.test_step(batch, batch_idx)

    def on_predict_epoch_end(self) -> None:
        """Run the exporter and save what it returns, in a folder of its own.

        That is `it{N}-export` or, where an earlier export has it, `it{N}-export-2` and so on.
        """
        if self.exporter.cfg.save_video:
            self.on_test_epoch_end()
        folder = None
        for out in self.exporter():
            save = getattr(self, f"save_{out.save_type}", None)
            if save is None:
                raise ValueError(
                    f"{type(self.exporter).__name__} asks for save_type {out.save_type!r}; "
                    f"{type(self).__name__} has no method save_{out.save_type}."
                )
            folder = folder or self._claim_export_folder()
            save(f"{folder}/{out.save_name}", **out.params)

    def _claim_export_folder(self) -> str:
        """Make a new folder for an export, so that none is overwritten; return its name."""
        first = name = f"it{self.true_global_step}-export"
        if get_rank() != 0:
            return first
        for number in itertools.count(2):
            try:
                os.makedirs(os.path.join(self.get_save_dir(), name))
                return name
            except FileExistsError:
                name = f"{first}-{number}"
        raise AssertionError("counting has no end")
