"""Noise schedules, samplers, attention processors, checkpoint conversion and loading."""
