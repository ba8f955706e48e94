"""Prompt processors of the models that are not Stable Diffusion."""
