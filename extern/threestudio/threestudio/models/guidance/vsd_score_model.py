"""The two scores of variational score distillation: a frozen U-Net, and one that learns renders.

The tuned score is the frozen one with low-rank updates (LoRA) in its attention and an embedding of
the camera added to its time embedding. Both are trees of modules over the same frozen tensors, so a
tuned score costs the memory of what it learns; calling one never changes the state of the other.

Dimensions: ``b`` images; ``c h w`` one latent; ``l`` and ``d`` tokens and width of a text; ``k``
numbers of the U-Net's own class vector; ``m`` numbers of the camera condition.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from threestudio.models.guidance.score_distillation import (
    classifier_free_guidance,
    split_prediction,
)
from threestudio.utils import rng

LORA_RANK = 4
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
# The error of one latent pixel is about 1e-5 of the mean, below what fp16 represents well: without
# the factor a tenth of the gradient is lost inside the U-Net. A power of two costs no precision.
HALF_GRADIENT_FACTOR = 2.0**10
CAMERA_CONDITION_SIZE = {"extrinsics": 16, "mvp": 16, "spherical": 4}


def camera_condition(
    kind: str,
    c2w: Float[Tensor, "b 4 4"] | None,
    mvp_mtx: Float[Tensor, "b 4 4"] | None,
    angles: tuple[Float[Tensor, "b"], Float[Tensor, "b"], Float[Tensor, "b"]],
) -> Float[Tensor, "b m"]:
    """Return what the tuned score is told of each camera.

    Args:
        kind: "extrinsics" is ``c2w`` row by row, its distance not normalised; "mvp" is ``mvp_mtx``
            row by row; "spherical" is (elevation, sin azimuth, cos azimuth, distance), radians.
        c2w: camera-to-world matrices.
        mvp_mtx: model-view-projection matrices.
        angles: elevation and azimuth in degrees, distance to the origin in world units.

    Raises:
        ValueError: if ``kind`` is unknown, or the matrix that it needs is None.
    """
    if kind not in CAMERA_CONDITION_SIZE:
        raise ValueError(
            f"camera_condition_type is {kind!r}; expected one of "
            f"{', '.join(map(repr, CAMERA_CONDITION_SIZE))}."
        )
    if kind == "spherical":
        elevation, azimuth = torch.deg2rad(angles[0]), torch.deg2rad(angles[1])
        return torch.stack([elevation, azimuth.sin(), azimuth.cos(), angles[2]], dim=-1).float()
    name, matrix = ("c2w", c2w) if kind == "extrinsics" else ("mvp_mtx", mvp_mtx)
    if matrix is None:
        raise ValueError(
            f"camera_condition_type is {kind!r}, but the batch holds no {name}. Pass **batch to "
            "the guidance, or set camera_condition_type=spherical."
        )
    return matrix.flatten(1).float()


class FrozenScore:
    """A U-Net as it was published, asked about single images.

    Args:
        unet: frozen `UNet2DConditionModel`.
        prediction_type: what it predicts, "epsilon" or "v_prediction".

    Raises:
        ValueError: if the U-Net has a class embedding other than a projected vector.
    """

    def __init__(self, unet: nn.Module, prediction_type: str) -> None:
        kind = unet.config.class_embed_type
        if kind not in (None, "projection") or unet.config.num_class_embeds is not None:
            raise ValueError(
                f"The U-Net's class_embed_type is {kind!r} with num_class_embeds "
                f"{unet.config.num_class_embeds}; expected no class embedding (Stable Diffusion) "
                "or 'projection' (a multi-view model). Choose another model."
            )
        self.unet = unet
        self.prediction_type = prediction_type
        self.weights_dtype = unet.conv_in.weight.dtype
        self.class_vector_size = (
            unet.config.projection_class_embeddings_input_dim if kind == "projection" else 0
        )

    def predict(
        self,
        noisy: Float[Tensor, "b c h w"],
        timesteps: Int[Tensor, "b"],
        text: Float[Tensor, "b l d"],
        vectors: Float[Tensor, "b k"] | None = None,
        camera: Float[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the U-Net's prediction in fp32, of its own kind.

        Args:
            noisy: noisy latents. timesteps: their noise. text: embedding of each one's prompt.
            vectors: the U-Net's own class vector; None is the zero vector, by which a multi-view
                model knows a single image. Nothing to a U-Net without one.
            camera: camera condition; only a tuned score reads it.
        """
        if self.class_vector_size == 0:
            vectors = None
        elif vectors is None:
            vectors = noisy.new_zeros(len(noisy), self.class_vector_size)
        if vectors is not None:
            vectors = vectors.to(self.weights_dtype)
        return self.unet(
            noisy.to(self.weights_dtype),
            timesteps,
            encoder_hidden_states=text.to(noisy.device, self.weights_dtype),
            class_labels=self._class_labels(vectors, camera),
        ).sample.float()

    def guided_noise(
        self,
        noisy: Float[Tensor, "b c h w"],
        timesteps: Int[Tensor, "b"],
        scales: tuple[Float[Tensor, "b"], Float[Tensor, "b"]],
        text: Float[Tensor, "2*b l d"],
        guidance_scale: float,
        vectors: Float[Tensor, "b k"] | None = None,
        camera: Float[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the predicted noise after classifier-free guidance, without gradients.

        eps_uncond + s (eps_text - eps_uncond); at s = 1 the unconditional half is not computed.

        Args:
            scales: (signal_scale, noise_scale) of the noisy latents.
            text: conditional rows first. The unconditional half sees the zero camera condition.
        """
        halves = 1 if guidance_scale == 1.0 else 2
        batch = len(noisy)
        if camera is not None:
            camera = torch.cat([camera, torch.zeros_like(camera)])[: halves * batch]
        # Inference mode spares small U-Nets their bookkeeping; the clone leaves it, so that what
        # follows may be kept by autograd.
        with torch.inference_mode():
            output = self.predict(
                noisy.repeat(halves, 1, 1, 1),
                timesteps.repeat(halves),
                text[: halves * batch],
                None if vectors is None else vectors.repeat(halves, 1),
                camera,
            )
        output = output.clone()
        if halves == 2:
            # Guidance is linear in the prediction, so it may come before the conversion.
            output = classifier_free_guidance(*output.chunk(2), guidance_scale)
        return split_prediction(output, noisy, *scales, self.prediction_type)[1]

    def _class_labels(self, vectors: Tensor | None, camera: Tensor | None) -> Any:
        return vectors


class TunedScore(FrozenScore):
    """A frozen score with what it learns about the renders: LoRA and a camera embedding.

    LoRA of rank 4 sits on the queries, keys, values and outputs of every attention (Hu et al.
    2021). Its last factor and the camera embedding's last layer start at zero, so an untrained
    tuned score is the frozen one. Through fp16 weights, gradients travel multiplied by a factor
    that their parameters divide out again.

    Attributes:
        lora_layers: module that holds the LoRA factors, fp32, named as in the U-Net.
        camera_embedding: MLP from the camera condition to the U-Net's time embedding, fp32.

    Random: the initial factors and the first layer, from the stream "vsd-init"; the global
    generator is left as it was.

    Args:
        frozen: the score to tune; it stays as it is, and the two share its tensors.
        camera_size: numbers of the camera condition.
    """

    def __init__(self, frozen: FrozenScore, camera_size: int) -> None:
        shared = {id(tensor): tensor for tensor in _tensors(frozen.unet)}
        super().__init__(copy.deepcopy(frozen.unet, shared), frozen.prediction_type)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(rng.derive_seed("vsd-init", 0))
            self.lora_layers = _add_lora(self.unet)
            self.camera_embedding = _camera_embedding(self.unet, camera_size)
        self.unet.class_embedding = _CameraClassEmbedding(
            self.unet.class_embedding, self.camera_embedding
        )

        self._gradient_factor = 1.0
        if self.weights_dtype == torch.float16:
            self._gradient_factor = HALF_GRADIENT_FACTOR
            for module in (self.lora_layers, self.camera_embedding):
                for parameter in module.parameters():
                    parameter.register_hook(lambda gradient: gradient / HALF_GRADIENT_FACTOR)

    def predict(self, *args: Any, **kwargs: Any) -> Float[Tensor, "b c h w"]:
        """As `FrozenScore.predict`; differentiable in LoRA and camera embedding.

        Raises:
            ValueError: if ``camera`` is None.
        """
        output = super().predict(*args, **kwargs)
        if output.requires_grad and self._gradient_factor != 1.0:
            output.register_hook(lambda gradient: gradient * self._gradient_factor)
        return output

    def _class_labels(self, vectors: Tensor | None, camera: Tensor | None) -> Any:
        if camera is None:
            raise ValueError("camera is None; expected the camera condition of each image.")
        return vectors, camera


class _CameraClassEmbedding(nn.Module):
    """Stands in a U-Net for its class embedding: the original's value, if any, plus the camera's.

    diffusers hands ``class_labels`` over as they are, hence a pair serves.
    """

    def __init__(self, original: nn.Module | None, camera_embedding: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.camera_embedding = camera_embedding

    def forward(self, labels: tuple[Tensor | None, Tensor]) -> Tensor:
        vectors, camera = labels
        embedded = self.camera_embedding(camera.float())
        return embedded if self.original is None else self.original(vectors) + embedded


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _add_lora(unet: nn.Module) -> nn.Module:
    """Inject trainable LoRA layers into the U-Net and return them as a module of their own."""
    from peft import LoraConfig

    unet.add_adapter(
        LoraConfig(
            r=LORA_RANK,
            lora_alpha=LORA_RANK,
            init_lora_weights="gaussian",
            target_modules=list(LORA_TARGETS),
        )
    )
    root = nn.Module()
    for name, parameter in unet.named_parameters():
        if not parameter.requires_grad:
            continue
        # The factors take the dtype of the frozen weights; updates would vanish in fp16.
        parameter.data = parameter.data.float()
        *parents, leaf = name.replace(".default.", ".").split(".")
        node = root
        for part in parents:
            if part not in dict(node.named_children()):
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.register_parameter(leaf, parameter)
    return root


def _camera_embedding(unet: nn.Module, camera_size: int) -> nn.Module:
    from diffusers.models.embeddings import TimestepEmbedding

    width = unet.time_embedding.linear_2.out_features
    embedding = TimestepEmbedding(camera_size, width)
    nn.init.zeros_(embedding.linear_2.weight)
    nn.init.zeros_(embedding.linear_2.bias)
    return embedding.to(unet.conv_in.weight.device)
