"""Guidances of this extension: one file per model family, all on one score-distillation module."""
