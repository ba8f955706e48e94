"""A small network that learns where along rays a scene's weights are, beside the scene.

Shapes: ``n_points`` world positions.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from threestudio.models.geometry.base import contract_to_unisphere
from threestudio.models.networks import NetworkWithInputEncoding, get_encoding, get_mlp
from threestudio.suggest import did_you_mean
from threestudio.systems.utils import parse_optimizer, parse_scheduler_to_instance
from threestudio.utils.ops import get_activation

# From this step on the network learns once in SLOWEST_INTERVAL + 1 steps, before it more often.
SETTLED_STEP, SLOWEST_INTERVAL = 1000, 5
# Steepness of the annealing (Mip-NeRF 360, section 7).
ANNEAL_SLOPE = 10.0
KEYS = ("n_input_dims", "n_output_dims", "encoding_config", "network_config")


class ProposalNetwork(NetworkWithInputEncoding):
    """A density of its own, trained by its own optimizer to bound the weights of the scene.

    It learns inside the forward pass of a training step, so that a checkpoint made after any step
    holds all that the step did. ``trains_itself`` tells optimizers of systems to leave it alone.

    Args:
        bbox: the scene's box.
        unbounded: whether the scene goes on outside; else nothing is there.
        network_config: ``n_input_dims`` (3), ``n_output_dims`` (1), ``encoding_config`` and
            ``network_config``.
        optimizer_config: grammar of `threestudio.systems.utils.parse_optimizer`.
        scheduler_config: grammar of `parse_scheduler_to_instance`; advances once in a step.

    Raises:
        ValueError: a config is missing or cannot work.
    """

    trains_itself = True

    def __init__(
        self,
        bbox: Float[Tensor, "2 3"],
        unbounded: bool,
        network_config: Mapping[str, Any] | None,
        optimizer_config: Mapping[str, Any] | None,
        scheduler_config: Mapping[str, Any] | None = None,
    ) -> None:
        config = _checked(network_config, optimizer_config)
        encoding = get_encoding(3, config["encoding_config"])
        super().__init__(encoding, get_mlp(encoding.n_output_dims, 1, config["network_config"]))
        self.register_buffer("_bbox", bbox.clone(), persistent=False)
        self._unbounded = unbounded
        self._activation = get_activation("shifted_trunc_exp")
        self._optimizer = parse_optimizer(optimizer_config, self)
        self._scheduler = None
        if scheduler_config is not None:
            self._scheduler = parse_scheduler_to_instance(scheduler_config, self._optimizer)
        self._pending: dict[str, Any] | None = None
        self._step, self._learnt_step = 0, -1

    def density(self, points: Float[Tensor, "n_points 3"]) -> Float[Tensor, "n_points"]:
        """Density per world unit at world points; 0 outside the box of a bounded scene."""
        unit = contract_to_unisphere(points, self._bbox, self._unbounded)
        inside = ((unit > 0) & (unit < 1)).all(dim=-1)
        return self._activation(self(unit)[:, 0]) * inside

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Take note of the step."""
        self._step = global_step

    @property
    def is_due(self) -> bool:
        """Whether the network learns in this step: always at first, later every sixth step."""
        settled = min(self._step / SETTLED_STEP, 1.0)
        return self.training and self._step % (1 + int(SLOWEST_INTERVAL * settled)) == 0

    @property
    def anneal(self) -> float:
        """Power of the proposed weights: 0 at the first step, so that a network that knows nothing
        hides nothing from itself, and 1 from step `SETTLED_STEP` on."""
        settled = min(self._step / SETTLED_STEP, 1.0)
        return ANNEAL_SLOPE * settled / ((ANNEAL_SLOPE - 1.0) * settled + 1.0)

    def learn(self, loss: Float[Tensor, ""] | None) -> None:
        """Make one step of the optimizer; None stands for a rank that saw nothing.

        The gradient is the mean over ranks, all of which have to call. One that is not finite
        anywhere counts as zero: then only the optimizer's momentum moves weights.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) for p in parameters]
        if loss is not None:
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients = [g if f is None else f for g, f in zip(gradients, found)]
        if dist.is_available() and dist.is_initialized():
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
        # A decision on the device: to ask whether to move would make the host wait in every step.
        is_finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        self._move(parameters, [g.where(is_finite, torch.zeros_like(g)) for g in gradients])

    def _move(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        if self._pending is not None:
            # Only now: by its first use everything is on the device where it stays.
            self._optimizer.load_state_dict(self._pending["optimizer"])
            if self._scheduler is not None and self._pending["scheduler"] is not None:
                self._scheduler.load_state_dict(self._pending["scheduler"])
            self._pending = None
        if self._scheduler is not None and 0 <= self._learnt_step < self._step:
            self._scheduler.step()
        self._learnt_step = self._step
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> dict[str, Any]:
        """What a checkpoint needs, besides the weights, to go on to the same bits."""
        if self._pending is not None:
            return self._pending
        scheduler = None if self._scheduler is None else self._scheduler.state_dict()
        return {
            "optimizer": self._optimizer.state_dict(),
            "scheduler": scheduler,
            "learnt_step": self._learnt_step,
        }

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `optimizer_state`."""
        self._pending = dict(state)
        self._learnt_step = int(state["learnt_step"])


def _checked(
    network: Mapping[str, Any] | None, optimizer: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """The network's config; refused unless both are there and whole."""
    for key, value in (("proposal_network_config", network), ("prop_optimizer_config", optimizer)):
        if not value:
            raise ValueError(
                f"estimator is 'proposal' and {key} is empty; expected "
                + ("its encoding and network" if value is network else "a name and arguments")
                + ". Give it, or take estimator=importance, which needs no network."
            )
    for key in network:
        if key not in KEYS:
            raise ValueError(
                f"proposal_network_config has {key!r}; expected {', '.join(KEYS)}."
                + did_you_mean(key, KEYS)
            )
    for key, size in (("n_input_dims", 3), ("n_output_dims", 1)):
        if network.get(key, size) != size:
            raise ValueError(
                f"proposal_network_config.{key} is {network[key]}; expected {size}, since the "
                "network gives one density at a position."
            )
    for key in KEYS[2:]:
        if not network.get(key):
            raise ValueError(f"proposal_network_config has no {key}; expected its otype and sizes.")
    return network
