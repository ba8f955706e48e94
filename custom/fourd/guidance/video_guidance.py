"""What all video guidances share: clips in, score distillation of their latents, a loss out.

A subclass loads its model and makes the model call (`predict`); a model whose autoencoder joins
frames also replaces `encode_clips`, one without a diffusion schedule `scales`.

Dimensions: ``B`` clips of ``T`` frames, together ``N`` frames, those of a clip next to each other;
``n`` rows of a model call, conditional clips before unconditional ones; latents of ``c`` channels,
``t`` frames and ``h`` x ``w`` pixels; ``l`` and ``d`` tokens and width of a text.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Real
from threestudio.models.guidance.base import DiffusionGuidance
from threestudio.models.guidance.latent_images import encode_images, latent_size, resize_images
from threestudio.models.guidance.noise_schedule import (
    FlowSchedule,
    NoiseSchedule,
    noise_schedule,
)
from threestudio.models.guidance.score_distillation import (
    add_noise,
    amplify_motion,
    diffusion_scales,
    rescale_denoised,
    sds_weight,
    split_prediction,
    weighted_residual,
)
from threestudio.models.prompt_processors.base import PromptProcessorOutput
from threestudio.utils import rng
from threestudio.utils.misc import C, get_rank
from torch import Tensor


@dataclass(frozen=True)
class ClipCameras:
    """Where each frame of some clips was seen from, and when; None where the batch does not say."""

    c2w: Float[Tensor, "n T 4 4"] | None
    """Camera-to-world matrices."""
    fovy: Float[Tensor, "n T"] | None
    """Vertical fields of view in radians."""
    frame_times: Float[Tensor, "n T"] | None
    """Scene times in [0, 1]."""

    def repeat(self, times: int) -> "ClipCameras":
        """Return the clips ``times`` times over, one after another."""
        if times == 1:
            return self
        rows = (self.c2w, self.fovy, self.frame_times)
        return ClipCameras(*(None if row is None else torch.cat([row] * times) for row in rows))


class VideoDiffusionGuidance(DiffusionGuidance):
    """Score distillation from a video diffusion model; subclasses make the model call.

    Subclasses set in `configure`: ``self.vae``, ``self.weights_dtype``, ``self.frame_size`` (height
    and width in pixels of the frames that the model sees), and the schedule by `setup_schedule`.
    """

    @dataclass
    class Config(DiffusionGuidance.Config):
        """Keys that all video guidances know."""

        guidance_scale: Any = 100.0
        """Scale of classifier-free guidance, in the class's ``guidance_convention``."""
        weighting_strategy: str = "sds"
        """ "sds", "uniform" or "fantasia3d"; see `sds_weight`."""
        max_step_percent_annealed: Any = 0.5
        """Highest noise after ``anneal_start_step``, as a fraction of the training steps."""
        anneal_start_step: int | None = None
        """Last step of ``max_step_percent``; None keeps it."""
        low_ram_vae: Any = -1
        """So many random frames of a clip are encoded with a gradient, the others without one, as
        many at a time; 0 or less: all frames at once, with a gradient. ``true`` is 1."""
        motion_amp_scale: float = 1.0
        """Factor of what changes between the frames of the gradient; see `amplify_motion`."""
        recon_loss: bool = False
        """Reconstruct the clean latents instead of the SDS gradient."""
        recon_std_rescale: float = 0.0
        """Strength of ``recon_loss``'s contrast rescale over a whole clip, 0 to 1."""
        use_sjc: bool = False
        """Score Jacobian Chaining's gradient, that is uniform weights."""
        var_red: bool = True
        """Subtract the drawn noise in the SJC gradient (lower variance)."""
        token_merging: bool = False
        """Not provided; true is refused."""
        token_merging_params: dict | None = None
        """Accepted for upstream's configs, unused."""

    cfg: Config
    guidance_convention: str = "standard"
    """Meaning of ``guidance_scale``, see `classifier_free_guidance`."""
    frame_size: tuple[int, int]
    vae: torch.nn.Module
    weights_dtype: torch.dtype

    # To define in a subclass.

    def configure(self) -> None:
        """Load the model and call `setup_schedule`; to define."""
        raise NotImplementedError(f"{type(self).__name__} defines no configure.")

    def predict(
        self,
        noisy: Float[Tensor, "n c t h w"],
        timesteps: Real[Tensor, "n"],
        text: Float[Tensor, "n l d"],
        cameras: ClipCameras,
    ) -> Float[Tensor, "n c t h w"]:
        """Return the model's prediction for noisy clips; to define.

        Called once per step, in inference mode; rows are independent. What kind of prediction it is
        says ``self.schedule.prediction_type``.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no predict.")

    # The step.

    def __call__(
        self,
        rgb: Float[Tensor, "N H W C"],
        prompt_utils: PromptProcessorOutput | None,
        elevation: Float[Tensor, "..."],
        azimuth: Float[Tensor, "..."],
        camera_distances: Float[Tensor, "..."],
        c2w: Float[Tensor, "... 4 4"] | None = None,
        fovy: Float[Tensor, "..."] | None = None,
        frame_times: Float[Tensor, "..."] | None = None,
        rgb_as_latents: bool = False,
        num_frames: int | None = None,
        timestep: Real[Tensor, ""] | float | int | None = None,
        text_embeddings: Float[Tensor, "n l d"] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the distillation loss of rendered clips.

        Args:
            rgb: frames in [0, 1], or latents of the model's channels when ``rgb_as_latents``.
            prompt_utils: embeddings from the prompt processor; a clip's words name the view of its
                first frame.
            elevation: degrees, one per clip or per frame; as are all that follow.
            azimuth: degrees. camera_distances: world units.
            c2w: camera-to-world matrices. fovy: vertical fields of view in radians.
            frame_times: scene times in [0, 1], one per frame, or T that all clips share.
            rgb_as_latents: ``rgb`` already holds latents, one per frame.
            num_frames: T; None takes all of ``rgb`` for one clip.
            timestep: uses this timestep instead of drawing one.
            text_embeddings: uses these instead of ``prompt_utils``; conditional rows first.
            **kwargs: further keys of the batch, ignored.

        Returns:
            ``loss_sds_video`` (differentiable in ``rgb``, with ``low_ram_vae`` in some frames
            only), ``grad_norm`` (a tensor), ``min_step``, ``max_step``.

        Raises:
            ValueError: if ``rgb`` holds no whole clips, a value is neither per clip nor per frame,
                or the prompt asks for Perp-Neg.

        Random, each clip from its own streams of the step: its timestep ("video-timestep"), noise
        ("video-noise"), posterior ("video-posterior") and frames with a gradient ("vae-frames").
        """
        if getattr(prompt_utils, "use_perp_neg", False):
            raise ValueError(
                "use_perp_neg is true; expected false, since video guidances have no negative "
                "prompts of a view. Set use_perp_neg=false in the video prompt processor."
            )
        length = rgb.shape[0] if num_frames is None else num_frames
        if length < 1 or rgb.shape[0] % length:
            raise ValueError(
                f"The batch holds {rgb.shape[0]} frames; expected a multiple of num_frames="
                f"{length}, the frames of each clip next to each other."
            )
        clips = rgb.shape[0] // length
        if text_embeddings is None:
            angles = (
                _per_frame(value, name, clips, length)[:, 0]
                for value, name in (
                    (elevation, "elevation"),
                    (azimuth, "azimuth"),
                    (camera_distances, "camera_distances"),
                )
            )
            text_embeddings = prompt_utils.get_text_embeddings(
                *angles, self.cfg.view_dependent_prompting
            )
        cameras = self.clip_cameras(clips, length, c2w, fovy, frame_times)
        latents = self.encode_clips(rgb, length, rgb_as_latents)
        if timestep is None:
            timesteps = self.draw_timesteps("video-timestep", clips, shared=False)
        else:
            timesteps = torch.as_tensor(timestep, device=self.device).expand(clips)
        noise = self.draw_noise("video-noise", tuple(latents.shape))
        gradient = self.gradient(latents.detach(), noise, timesteps, text_embeddings, cameras)
        return self.distillation("loss_sds_video", latents, gradient)

    def setup_schedule(self, schedule: NoiseSchedule | FlowSchedule) -> None:
        """See `DiffusionGuidance.setup_schedule`; also refuses keys for what is not provided."""
        if self.cfg.token_merging:
            raise ValueError(
                "token_merging is true; expected false, since token merging is not provided."
            )
        if not isinstance(self.cfg.low_ram_vae, int):
            raise ValueError(
                f"low_ram_vae is {self.cfg.low_ram_vae!r}; expected how many frames of a clip are "
                "encoded with a gradient, such as 4, or -1 for all."
            )
        super().setup_schedule(schedule)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Evaluate every scheduled key at a step, whatever steps were visited before."""
        super().update_step(epoch, global_step, on_load_weights)
        if self.cfg.anneal_start_step is not None and global_step > self.cfg.anneal_start_step:
            self.set_min_max_steps(
                C(self.cfg.min_step_percent, epoch, global_step),
                C(self.cfg.max_step_percent_annealed, epoch, global_step),
            )

    def clip_cameras(
        self,
        clips: int,
        length: int,
        c2w: Tensor | None,
        fovy: Tensor | None,
        frame_times: Tensor | None,
    ) -> ClipCameras:
        """Return the cameras of each frame of each clip, on this device; see `__call__`."""
        if frame_times is not None and frame_times.shape[0] == length:
            frame_times = frame_times.repeat(clips)
        rows = {"c2w": c2w, "fovy": fovy, "frame_times": frame_times}
        return ClipCameras(
            **{
                name: None
                if value is None
                else _per_frame(value, name, clips, length).to(self.device).float()
                for name, value in rows.items()
            }
        )

    # Frames to latents.

    def encode_clips(
        self, rgb: Float[Tensor, "N H W C"], num_frames: int, rgb_as_latents: bool = False
    ) -> Float[Tensor, "B c t h w"]:
        """Return scaled latents of clips in [0, 1], or latents resized; differentiable.

        Here each frame is encoded by itself, so t = T.
        """
        images = rgb.permute(0, 3, 1, 2).float()
        if rgb_as_latents:
            height, width = (latent_size(self.vae, edge) for edge in self.frame_size)
            frames = resize_images(images, (height, width))
        else:
            frames = self.encode_frames(resize_images(images, self.frame_size), num_frames)
        return frames.unflatten(0, (-1, num_frames)).transpose(1, 2)

    def encode_frames(
        self, images: Float[Tensor, "N 3 H W"], num_frames: int
    ) -> Float[Tensor, "N c h w"]:
        """Return the scaled latents of frames, by an image autoencoder; see ``low_ram_vae``."""
        clips = images.shape[0] // num_frames

        def encode(rows: Int[Tensor, "k"]) -> Tensor:
            def draw(shape: tuple[int, ...]) -> Tensor:
                every = self.draw_noise("video-posterior", (clips, num_frames, *shape[1:]))
                return every.flatten(0, 1)[rows]

            return encode_images(self.vae, images[rows], draw)

        if not 0 < int(self.cfg.low_ram_vae) < num_frames:
            return encode(torch.arange(len(images), device=images.device))
        chosen = self.frames_with_gradient(clips, num_frames).flatten().to(images.device)
        tracked, others = chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]
        latents = [encode(tracked)]
        with torch.no_grad():
            latents += [encode(rows) for rows in others.split(len(tracked))]
        return torch.cat(latents)[torch.cat([tracked, others]).argsort()]

    def frames_with_gradient(self, clips: int, num_frames: int) -> Bool[Tensor, "B T"]:
        """Draw ``low_ram_vae`` frames of each clip for the current step ("vae-frames")."""
        chosen = torch.zeros(clips, num_frames, dtype=torch.bool)
        for clip in range(clips):
            stream = rng.generator("vae-frames", self._step, get_rank() * clips + clip)
            order = torch.randperm(num_frames, generator=stream)
            chosen[clip, order[: int(self.cfg.low_ram_vae)]] = True
        return chosen

    # Score distillation.

    def scales(self, timesteps: Real[Tensor, "B"]) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Return (signal_scale, noise_scale) of the noisy latents of each clip."""
        return diffusion_scales(self.alphas_cumprod, timesteps)

    @torch.no_grad()
    def gradient(
        self,
        latents: Float[Tensor, "B c t h w"],
        noise: Float[Tensor, "B c t h w"],
        timesteps: Real[Tensor, "B"],
        text_embeddings: Float[Tensor, "2*B l d"],
        cameras: ClipCameras,
    ) -> Float[Tensor, "B c t h w"]:
        """Return the gradient of the loss times B with respect to the latents.

        w (noise_pred - noise), or with ``recon_loss`` latents - x0*, x0* the rescaled clean latent;
        then its motion is amplified.
        """
        signal, noise_scale = self.scales(timesteps)
        noisy = add_noise(latents, noise, signal, noise_scale)
        rescale = self.cfg.recon_std_rescale if self.cfg.recon_loss else 0.0

        def predict(halves: int, text: Tensor) -> Tensor:
            return self.predict(
                torch.cat([noisy.to(self.weights_dtype)] * halves),
                timesteps.repeat(halves),
                text.to(noisy.device, self.weights_dtype),
                cameras.repeat(halves),
            )

        cond, guided = self.guided_prediction(
            predict, text_embeddings, rescale > 0, self.guidance_convention
        )
        kind = self.schedule.prediction_type
        denoised, noise_pred = split_prediction(guided, noisy, signal, noise_scale, kind)
        if self.cfg.recon_loss:
            if rescale > 0:
                denoised_cond, _ = split_prediction(cond, noisy, signal, noise_scale, kind)
                # A clip is one item, so its group of frames is already together in it.
                denoised = rescale_denoised(denoised, denoised_cond, 1, rescale)
            residual = latents - denoised
        else:
            residual = self.sds_residual(guided, noise_pred, latents, noise, signal, noise_scale)
        if self.cfg.motion_amp_scale == 1.0:
            return residual
        return amplify_motion(residual, self.cfg.motion_amp_scale)

    def sds_residual(
        self,
        guided: Float[Tensor, "B c t h w"],
        noise_pred: Float[Tensor, "B c t h w"],
        latents: Float[Tensor, "B c t h w"],
        noise: Float[Tensor, "B c t h w"],
        signal_scale: Float[Tensor, "B"],
        noise_scale: Float[Tensor, "B"],
    ) -> Float[Tensor, "B c t h w"]:
        """Return w (noise_pred - noise); a flow-matching model weights velocities instead.

        ``guided`` is the model's own prediction after guidance, ``noise_pred`` the noise in it.
        """
        strategy = "uniform" if self.cfg.use_sjc else self.cfg.weighting_strategy
        keep = self.cfg.use_sjc and not self.cfg.var_red
        reference = torch.zeros_like(noise) if keep else noise
        weight = sds_weight(strategy, signal_scale, noise_scale)
        return weighted_residual(noise_pred, reference, weight)


def require_schedule(
    schedule: NoiseSchedule,
    name: str,
    beta_schedule: str = "scaled_linear",
    prediction_type: str = "epsilon",
) -> None:
    """Refuse a model whose schedule is not that of its family: 1000 steps, betas 0.00085 to 0.012.

    A wrong scheduler file would not fail, it would train the scene on wrongly scaled noise.

    Raises:
        ValueError: naming the model, what its folder says and what was expected.
    """
    expected = noise_schedule(
        {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": beta_schedule,
            "prediction_type": prediction_type,
        }
    )
    same_length = schedule.num_train_timesteps == expected.num_train_timesteps
    if (
        same_length
        and schedule.prediction_type == prediction_type
        and torch.allclose(schedule.alphas_cumprod, expected.alphas_cumprod, atol=1e-4)
    ):
        return
    raise ValueError(
        f"The scheduler of '{name}' has {schedule.num_train_timesteps} steps, predicts "
        f"{schedule.prediction_type!r} and ends at alphas_cumprod="
        f"{schedule.alphas_cumprod[-1]:.4g}; expected 1000, {prediction_type!r} and "
        f"{expected.alphas_cumprod[-1]:.4g} ({beta_schedule} betas from 0.00085 to 0.012). "
        "Correct scheduler/scheduler_config.json of the model."
    )


def use_channels_last(model: torch.nn.Module) -> None:
    """Store 2D convolutions channels-last; 1D and 3D weights have no such layout and stay."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _per_frame(
    value: Float[Tensor, "..."], name: str, clips: int, length: int
) -> Float[Tensor, "B T ..."]:
    """Return what is given per clip or per frame, per frame of each clip."""
    if value.shape[0] == clips * length:
        return value.unflatten(0, (clips, length))
    if value.shape[0] == clips:
        return value.unsqueeze(1).expand(-1, length, *value.shape[1:])
    raise ValueError(
        f"{name} has shape {tuple(value.shape)}; expected one row for each of {clips} clips, or "
        f"for each of their {clips * length} frames."
    )
