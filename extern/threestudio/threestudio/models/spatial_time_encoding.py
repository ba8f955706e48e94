"""Encodings of points that move: a static 3D grid together with a grid over space and time.

Both take one scene time per point as a tensor argument. Shapes: n points, f features.

**Looping time.** With ``loop_time`` the time part F is replaced by a periodic one, P(t) = P(t + 1):

    P(t) = F((t + 1) / (1 + d)) + (F(t / (1 + d)) - F((t + 1) / (1 + d))) t / d    for 0 <= t < d
    P(t) = F(t / (1 + d))                                                          for d <= t < 1

F is asked for on a time axis that is d longer than the loop, and the surplus fades into the start.
So P runs through t = 1 as it runs through any other time: both sides of the seam read, and train,
the entries of F around 1 / (1 + d). Nothing is lost: F that repeats its first d at its end gives
any loop at almost the same resolution in time. On the CPU only points with t < d cost a second
look-up; on a GPU all do, because to ask which ones those are would wait for the device.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from threestudio.kernels.hash_grid import HashGridEncoding, hash_grid_encode_sum
from threestudio.utils.base import Updateable

# Length d of the fade between the end and the start of looping time, as a share of the loop.
LOOP_OVERLAP = 0.125


class SpatialTimeEncoding(nn.Module, Updateable):
    """What the two encodings share: the 3D grid, and where the time of a point comes from.

    Attributes:
        encoding: the 3D grid.
        static: the scene does not move; the time part is frozen.
        loop_time: time repeats with period 1, see the module's text.
        moves: cells of the unit cube, by axis, in which time counts; elsewhere the field is at all
            times what it is at 0. A buffer, all True at first; None without ``motion_cells``.
        frame_time: the contract's hidden scene time, for foreign extensions only: a number or a
            tensor of one or n times, used where ``frame_times`` is not given. None means 0.
        is_video, update_occ_grid: set by foreign systems; nothing here reads them.
    """

    accepts_frame_times = True

    def __init__(self, in_channels: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.n_input_dims = in_channels
        self.static = bool(config.get("static", False))
        self.loop_time = bool(config.get("loop_time", False))
        cells = _motion_cells(config)
        moves = torch.ones((cells,) * in_channels, dtype=torch.bool) if cells else None
        self.register_buffer("moves", moves)
        self.encoding = _grid(in_channels, config)
        self.n_output_dims = self.encoding.n_output_dims
        self.frame_time: float | Tensor | None = None
        self.is_video = True
        self.update_occ_grid = False

    def points_in_time(
        self, x: Float[Tensor, "n d"], frame_times: Float[Tensor, "*times"] | None
    ) -> Float[Tensor, "n d_plus_1"]:
        """Appends to each point its time.

        Raises:
            ValueError: the number of times is neither 1 nor the number of points.
        """
        times = self.frame_time if frame_times is None else frame_times
        times = torch.as_tensor(0.0 if times is None else times, dtype=x.dtype, device=x.device)
        if times.numel() not in (1, x.shape[0]):
            raise ValueError(
                f"frame_times has shape {tuple(times.shape)} for {x.shape[0]} points; "
                "expected one time per point, (n,) or (n, 1), or a single one."
            )
        times = times.reshape(-1, 1).expand(x.shape[0], 1)
        if self.moves is not None:
            times = times * self._moves_at(x)
        return torch.cat((x, times), dim=1)

    def _moves_at(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
        cells = self.moves.shape[0]
        corner = (x.detach() * cells).long().clamp_(0, cells - 1)
        index = corner[:, 0]
        for axis in range(1, corner.shape[1]):
            index = index * cells + corner[:, axis]
        return self.moves.view(-1)[index].unsqueeze(1).to(x.dtype)

    @property
    def motion_cell_centres(self) -> Float[Tensor, "cells d"]:
        """Centres in the unit cube, in the order of ``moves`` flattened.

        Raises:
            ValueError: there are no such cells.
        """
        if self.moves is None:
            raise ValueError(
                "the encoding has no cells that could be held still; expected motion_cells of 1 or "
                "more in its config."
            )
        shape = self.moves.shape
        places = torch.cartesian_prod(*(torch.arange(n, device=self.moves.device) for n in shape))
        return (places + 0.5) / shape[0]

    def encode_time(self, x_frame_time: Float[Tensor, "n d_plus_1"]) -> Float[Tensor, "n f"]:
        """Features of the time part at points with their time appended, periodic if time loops."""
        if not self.loop_time:
            return self.encoding_time(x_frame_time)
        times = x_frame_time[:, -1:].remainder(1.0)
        stretch = 1.0 + LOOP_OVERLAP
        features = self.encoding_time(torch.cat((x_frame_time[:, :-1], times / stretch), dim=1))
        if x_frame_time.device.type != "cpu":
            return self._faded_everywhere(features, x_frame_time, times)
        start = (times[:, 0] < LOOP_OVERLAP).nonzero()[:, 0]
        if start.numel() == 0:
            return features
        early = times.index_select(0, start)
        past_end = torch.cat(
            (x_frame_time[:, :-1].index_select(0, start), (early + 1.0) / stretch), dim=1
        )
        ended = self.encoding_time(past_end)
        begun = features.index_select(0, start)
        return features.index_copy(0, start, torch.lerp(ended, begun, early / LOOP_OVERLAP))

    def _faded_everywhere(
        self,
        features: Float[Tensor, "n f"],
        x_frame_time: Float[Tensor, "n d_plus_1"],
        times: Float[Tensor, "n 1"],
    ) -> Float[Tensor, "n f"]:
        """The same by fixed shapes: past the fade the second look-up has no weight."""
        faded = times.clamp(max=LOOP_OVERLAP)
        past_end = torch.cat((x_frame_time[:, :-1], (faded + 1.0) / (1.0 + LOOP_OVERLAP)), dim=1)
        return torch.lerp(self.encoding_time(past_end), features, faded / LOOP_OVERLAP)


class HashGridSpatialTime(SpatialTimeEncoding):
    """Sum of a 3D grid over space and a 4D grid over space and time (4D-fy, section 3.1).

        e(x, t) = G_s(x) + G_d([x, t])

    Time is a grid axis like space: in [0, 1], periodic with ``loop_time`` only.

    Args:
        in_channels: 3.
        config: grid keys, used for both grids; ``static`` (default False) freezes the 4D grid,
            which still adds its initial +-1e-4 at t = 0; ``skip_time_when_static`` (default False)
            leaves it out instead while ``static`` holds, which saves its cost; ``loop_time``
            (default False) joins t = 1 to t = 0; ``motion_cells`` (default 0, none), cells per
            axis of ``moves``. Not changed.

    Raises:
        ValueError: ``motion_cells`` is out of its range.
    """

    def __init__(self, in_channels: int, config: Mapping[str, Any]) -> None:
        super().__init__(in_channels, config)
        self.encoding_time = _grid(in_channels + 1, config)
        self.skip_time_when_static = bool(config.get("skip_time_when_static", False))
        if self.static:
            self.set_temp_param_grad(False)

    def set_temp_param_grad(self, requires_grad: bool = False) -> None:
        """Lets the 4D grid train, or freezes it."""
        self.encoding_time.requires_grad_(requires_grad)

    def forward(
        self,
        x: Float[Tensor, "n 3"],
        frame_times: Float[Tensor, "*times"] | None = None,
    ) -> Float[Tensor, "n f"]:
        """Encodes points in [0, 1]^3 at times in [0, 1].

        Args:
            frame_times: one per point, (n,) or (n, 1), or a single one for all; None takes
                `frame_time`, or 0 where that is unset.
        """
        if self.static and self.skip_time_when_static:
            return self.encoding(x)
        in_time = self.points_in_time(x, frame_times)
        if self.loop_time:
            return self.encoding(x) + self.encode_time(in_time)
        space, time = self.encoding, self.encoding_time
        return hash_grid_encode_sum(
            in_time, space.params, time.params, space.layout, time.layout, space.backend
        )


class HashGridSpatialTimeDeform(SpatialTimeEncoding):
    """A 3D grid looked up at points displaced by a field over space and time.

        e(x, t) = G_s(clamp(x + D([x, t]), 0, 1)),  D = MLP(G_d([x, t]))

    The last layer of the MLP starts at zero, so training starts from the undeformed scene. Where a
    coordinate is clamped, its displacement gets no gradient.

    Args:
        in_channels: 3.
        config: keys of the 3D grid; ``time_encoding_config`` and ``time_network_config`` of the
            displacement field; ``static`` (default False) leaves the displacement out;
            ``loop_time`` (default False) joins t = 1 to t = 0; ``motion_cells`` as for
            `HashGridSpatialTime`. Not changed.
    """

    def __init__(self, in_channels: int, config: Mapping[str, Any]) -> None:
        # The factories live one level up and know this class.
        from threestudio.models.networks import get_encoding, get_mlp

        super().__init__(in_channels, config)
        self.encoding_time = get_encoding(in_channels + 1, config["time_encoding_config"])
        self.time_network = get_mlp(
            self.encoding_time.n_output_dims, in_channels, config["time_network_config"]
        )
        nn.init.zeros_(self.time_network.layers[-1].weight)
        if self.static:
            self.set_temp_param_grad(False)

    def set_temp_param_grad(self, requires_grad: bool = False) -> None:
        """Lets the displacement field train, or freezes it; the 3D grid trains while static."""
        self.encoding_time.requires_grad_(requires_grad)
        self.time_network.requires_grad_(requires_grad)
        self.encoding.requires_grad_(self.static)

    def warp(self, x_frame_time: Float[Tensor, "n 4"]) -> Float[Tensor, "n 3"]:
        """Displacement of points with their time appended, in units of the unit cube."""
        return self.time_network(self.encode_time(x_frame_time))

    def forward(
        self,
        x: Float[Tensor, "n 3"],
        frame_times: Float[Tensor, "*times"] | None = None,
        out_all: bool = False,
    ) -> Float[Tensor, "n f"] | tuple[Float[Tensor, "n f"], Float[Tensor, "n 3"] | None]:
        """Encodes points in [0, 1]^3 at times in [0, 1].

        Args:
            frame_times: one per point, (n,) or (n, 1), or a single one for all; None takes
                `frame_time`, or 0 where that is unset.
            out_all: also return the displacement, None while static.
        """
        displacement = None
        if not self.static:
            displacement = self.warp(self.points_in_time(x, frame_times))
            x = (x + displacement).clamp(0.0, 1.0)
        features = self.encoding(x)
        return (features, displacement) if out_all else features


def _grid(n_input_dims: int, config: Mapping[str, Any]) -> HashGridEncoding:
    grid_config = {**config, "otype": "HashGrid"}
    return HashGridEncoding(n_input_dims, grid_config, backend=config.get("backend", "auto"))


def _motion_cells(config: Mapping[str, Any]) -> int:
    cells = config.get("motion_cells", 0)
    if isinstance(cells, bool) or not isinstance(cells, int) or not 0 <= cells <= 256:
        raise ValueError(
            f"motion_cells is {cells!r}; expected a whole number from 0, for none, to 256."
        )
    return cells
