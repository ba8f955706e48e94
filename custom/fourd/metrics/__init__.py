"""Measures of images and scenes, one file each."""
