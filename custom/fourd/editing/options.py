"""The keys of an edit, their published values, and what they may be.

A key that is null takes the value that was published for the order; `edit_options` fills it in.
Strengths are pairs as published: T (``*_num_steps``), of 1000, says how noisy a frame is made, and
n (``*_diffusion_steps``) in how many steps it is denoised; see `samplers.partial_timesteps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from threestudio.utils.config import parse_structured

ORDERS = ("release", "paper", "single_view", "frame_wise")
EXECUTORS = ("interleaved", "threaded")
FLOW_CHECKS = ("strict", "release")
REST_ANCHORS = ("common", "chunk")
PUBLISHED: dict[str, dict[str, Any]] = {
    "release": {"overlap_length": 0, "refine": (700, 6), "attention": "anchor"},
    "paper": {"overlap_length": 0, "refine": (700, 6), "attention": "anchor"},
    "single_view": {
        "overlap_length": 1,
        "refine": (700, 5),
        "later_refine": (550, 3),
        "attention": "anchor_self",
    },
    "frame_wise": {"overlap_length": 0, "refine": (1000, 20), "attention": "none"},
}
"""What the keys that are null stand for."""


@dataclass
class EditConfig:
    """Keys of `system.edit`."""

    order: str = "release"
    """in which order frames are edited. "release": the first time over all cameras, then each
    camera along time. "paper": some cameras along time, then all others from these. "single_view":
    one frame, then along time, every camera by itself. "frame_wise": every frame alone, the
    baseline"""
    passes: int = 1
    """how often all frames are edited: in the paper's order with new key cameras each time"""
    warm_up_steps: int = 12
    """rounds in which the release edits the first time, falling in strength"""
    sequence_length: int = 5
    """frames in a window, and other cameras that are painted together"""
    key_cameras: int | None = None
    """cameras that are edited jointly in a round; null: as many as a window has frames"""
    overlap_length: int | None = None
    """frames that a window shares with the one before; null: 0, and 1 for a single view"""
    diffusion_steps: int = 20
    """n of key frames"""
    num_steps: int = 1000
    """T of key frames"""
    refine_diffusion_steps: int | None = None
    """n of windows; null: 6, for a single view 5, frame by frame 20"""
    refine_num_steps: int | None = None
    """T of windows; null: 700, frame by frame 1000"""
    later_refine_diffusion_steps: int | None = None
    """n of windows after the first pass; null: 3 for a single view, else as in the first"""
    later_refine_num_steps: int | None = None
    """T of windows after the first pass; null: 550 for a single view, else as in the first"""
    restview_refine_diffusion_steps: int = 10
    """n of the other cameras' key frames"""
    restview_refine_num_steps: int = 800
    """T of the other cameras' key frames"""
    later_passes_from: str | None = None
    """what passes after the first start from: "render" of the field or "buffer", the edits so far;
    null: render in the paper's order, else buffer"""
    attention: str | None = None
    """what frames attend to, see the guidance; null: anchor, for a single view anchor_self, frame
    by frame none"""
    use_flow: bool = True
    """carry edits along time; false is an ablation"""
    use_depth: bool = True
    """carry edits between cameras; false is an ablation"""
    use_anchor: bool = True
    """let frames look at a common one; false is an ablation"""
    refresh_anchor: bool = False
    """after the first window, take the anchor as that window repainted it: parity with the
    release"""
    rest_anchor: str = "common"
    """whose look the other cameras' key frames borrow: "common", that of a key camera, or "chunk",
    that of the first among them, which parts the chunks; parity with the release"""
    depth_tau_keys: float = 0.05
    """largest difference in depth between cameras that are edited jointly, as a share of depth"""
    depth_tau_rest: float = 0.02
    """the same towards all other cameras"""
    depth_tau_is_absolute: bool = False
    """thresholds are in world units; parity with the release"""
    warp_ratio: float = 0.5
    """share of the key cameras' look that the other cameras take in each round of the release"""
    temporal_share: float = 0.5
    """share of what comes along time where it can be had from the key cameras too"""
    time_reach: int = 0
    """frames before and after whose edits are averaged into a frame along the originals' flow, once
    a pass is through with a camera; 0: none, as published"""
    time_agreement: float = 0.05
    """largest difference of the originals' colours, in [0, 1], at which that flow is trusted"""
    flow: str = "auto"
    """"raft", "dis", or "auto": raft where torchvision is installed"""
    flow_check: str = "strict"
    """when flows there and back agree: "strict", the usual test, or "release", a loose one"""
    flow_cache_dir: str = ".threestudio_cache/flow"
    """where flows of the original frames are kept from run to run"""
    executor: str = "interleaved"
    """"interleaved" edits between training steps; "threaded" beside them, for a second device"""
    device: str | None = None
    """device of the edit model, for a second one; null: that of the training"""
    items_per_turn: int = 1
    """items that each process edits in one turn"""
    turn_interval_steps: int | None = None
    """training steps between two turns; null spreads them over the training"""
    min_edit_fraction: float = 0.0
    """share of the frames that is edited before training starts; key times are in any case"""
    post_edit_steps: int = 0
    """training steps after the last edit, at least; training is extended where it is too short"""
    preview_every: int = 1
    """items between two pictures in `save/edits`; 0 makes none"""


@dataclass(frozen=True)
class Strength:
    """How strongly frames are edited; see `samplers.partial_timesteps`."""

    start: int
    """T, of the model's 1000 steps"""
    steps: int
    """n, the number of denoising steps"""

    def scaled(self, factor: float) -> Strength:
        """Both numbers times a factor, rounded down as published, at least 1."""
        return Strength(max(1, int(self.start * factor)), max(1, int(self.steps * factor)))


def edit_options(keys: Mapping[str, Any]) -> EditConfig:
    """Return the keys of an edit, checked, those that are null filled in.

    Raises:
        ValueError: a value cannot work, naming its key.
    """
    options = EditConfig(**OmegaConf.to_container(parse_structured(EditConfig, keys)))
    _check_words(options)
    published = PUBLISHED[options.order]
    first = published["refine"]
    later = published.get("later_refine")
    for key, value in (
        ("overlap_length", published["overlap_length"]),
        ("attention", published["attention"]),
        ("refine_num_steps", first[0]),
        ("refine_diffusion_steps", first[1]),
        ("key_cameras", options.sequence_length),
        ("later_passes_from", "render" if options.order == "paper" else "buffer"),
    ):
        _fill(options, key, value)
    # Resolved last: without published values of their own, they are those of the first pass.
    later = later or (options.refine_num_steps, options.refine_diffusion_steps)
    for key, value in zip(("num_steps", "diffusion_steps"), later, strict=True):
        _fill(options, f"later_refine_{key}", value)
    if not options.use_anchor:
        options.attention = "none"
    _check_numbers(options)
    return options


def _fill(options: EditConfig, key: str, value: Any) -> None:
    if getattr(options, key) is None:
        setattr(options, key, value)


def strength(options: EditConfig, kind: str, is_later: bool = False) -> Strength:
    """T and n of "key", "restview_refine" or "refine", of the first pass or a later one."""
    prefix = "" if kind == "key" else f"{kind}_"
    if is_later and kind == "refine":
        prefix = "later_refine_"
    numbers = (getattr(options, f"{prefix}{name}") for name in ("num_steps", "diffusion_steps"))
    return Strength(*numbers)


def _check_words(options: EditConfig) -> None:
    from custom.fourd.diffusion.edit_denoiser import ATTENTIONS
    from custom.fourd.ops.optical_flow import KINDS

    known = {
        "order": ORDERS,
        "executor": EXECUTORS,
        "flow": KINDS,
        "flow_check": FLOW_CHECKS,
        "rest_anchor": REST_ANCHORS,
        "later_passes_from": (None, "render", "buffer"),
        "attention": (None, *ATTENTIONS),
    }
    for key, words in known.items():
        value = getattr(options, key)
        if value not in words:
            listed = ", ".join("null" if word is None else word for word in words)
            raise ValueError(f"system.edit.{key} is {value!r}; expected one of {listed}.")


def _check_numbers(options: EditConfig) -> None:
    least = dict.fromkeys(
        ("passes", "warm_up_steps", "sequence_length", "key_cameras", "items_per_turn",
         "diffusion_steps",
         "num_steps", "refine_diffusion_steps", "refine_num_steps", "restview_refine_num_steps",
         "later_refine_diffusion_steps", "later_refine_num_steps", "turn_interval_steps",
         "restview_refine_diffusion_steps"), 1
    )  # fmt: skip
    least |= dict.fromkeys(("overlap_length", "post_edit_steps", "preview_every", "time_reach"), 0)
    for key, low in least.items():
        value = getattr(options, key)
        if value is not None and value < low:
            raise ValueError(f"system.edit.{key} is {value}; expected {low} or more.")
    for key in ("warp_ratio", "temporal_share", "min_edit_fraction"):
        if not 0 <= getattr(options, key) <= 1:
            raise ValueError(
                f"system.edit.{key} is {getattr(options, key)}; expected a share from 0 to 1."
            )
    for key in ("depth_tau_keys", "depth_tau_rest", "time_agreement"):
        if not getattr(options, key) > 0:
            raise ValueError(f"system.edit.{key} is {getattr(options, key)}; expected more than 0.")
    if options.overlap_length >= options.sequence_length:
        raise ValueError(
            f"system.edit.overlap_length is {options.overlap_length} and sequence_length "
            f"{options.sequence_length}; expected a window longer than what it shares."
        )
    if options.executor == "interleaved" and options.device is not None:
        raise ValueError(
            f"system.edit.device is {options.device!r}, but executor=interleaved edits between "
            "training steps; set executor=threaded, or leave device null."
        )
