"""Encodings of time, view and diffusion schedule."""
