"""The loss of a distillation step: what a guidance returns plus regularisers, each weighted.

Every system that renders a scene and asks a guidance about it adds up its loss here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from threestudio.systems.regularisers import (
    eikonal_loss,
    opaque_loss,
    orientation_loss,
    sparsity_loss,
    z_variance_loss,
)


class Distillation:
    """Mixin of a system: one prompt, and ``lambda_x`` in `cfg.loss` for every term ``loss_x``.

    Uses of the system: `cfg`, `C`, `log`.
    """

    @property
    def prompt(self) -> str:
        """The words that the scene is made from."""
        return self.cfg.prompt_processor.get("prompt", "")

    def require_prompt(self) -> None:
        """Raise ValueError where the config has no words to make a scene from."""
        if not str(self.prompt).strip():
            raise ValueError(
                "system.prompt_processor.prompt is empty; expected the words to make a scene from, "
                "such as system.prompt_processor.prompt='a red cube'."
            )

    def guidance_terms(self, guided: dict[str, Any]) -> dict[str, Tensor]:
        """Return the ``loss_*`` of a guidance's answer; its other numbers are logged."""
        for name, value in guided.items():
            is_number = isinstance(value, (int, float)) or (
                isinstance(value, Tensor) and value.numel() == 1
            )
            if is_number and not name.startswith("loss_"):
                self.log(f"train/{name}", value)
        return {name: value for name, value in guided.items() if name.startswith("loss_")}

    def _regularisers(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms whose weight is not zero at this step, of a renderer's output."""
        terms = {}
        if self._weight("lambda_orient") > 0:
            if "normal" not in out:
                raise ValueError(
                    "system.loss.lambda_orient needs normals; use a material that requires them."
                )
            terms["loss_orient"] = orientation_loss(
                out["weights"], out["normal"], out["t_dirs"], out["opacity"]
            )
        if self._weight("lambda_sparsity") > 0:
            terms["loss_sparsity"] = sparsity_loss(out["opacity"])
        if self._weight("lambda_opaque") > 0:
            terms["loss_opaque"] = opaque_loss(out["opacity"])
        if self._weight("lambda_z_variance") > 0:
            terms["loss_z_variance"] = z_variance_loss(out["z_variance"], out["opacity"])
        if self._weight("lambda_eikonal") > 0 and "sdf_grad" in out:
            terms["loss_eikonal"] = eikonal_loss(out["sdf_grad"], out.get("is_padding"))
        return terms

    def weighted_loss(self, terms: dict[str, Tensor]) -> Tensor | float:
        """Sum the terms times their weights; each is logged, and so is the sum.

        Raises:
            ValueError: a term has no weight in `cfg.loss`.
        """
        loss: Tensor | float = 0.0
        for name, value in terms.items():
            self.log(f"train/{name}", value)
            loss = loss + value * self._required_weight(name.replace("loss_", "lambda_"))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def log_weights(self) -> None:
        """Log every entry of `cfg.loss` as it stands at this step, ``train_params/lambda_x``."""
        if not self.is_log_step:
            return
        for name, value in self.cfg.loss.items():
            self.log(f"train_params/{name}", self.C(value))

    def _weight(self, name: str) -> float:
        return self.C(self.cfg.loss.get(name, 0.0))

    def _required_weight(self, name: str) -> float:
        if name not in self.cfg.loss:
            raise ValueError(
                f"system.loss has no {name}, the weight of a term that this step's guidance "
                f"returns; write for example system.loss.{name}=1.0."
            )
        return self.C(self.cfg.loss[name])
