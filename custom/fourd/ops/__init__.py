"""Pure functions on tensors: no state, no configuration, no files, no hidden randomness."""
