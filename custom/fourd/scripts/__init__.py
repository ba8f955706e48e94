"""Commands that remake the embedded checkpoints from nothing."""
