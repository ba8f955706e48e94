"""Terms of training losses, one file each."""
