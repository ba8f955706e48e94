"""TimeMapper and ViewMapper: scene time and camera as words of a frozen diffusion model."""
