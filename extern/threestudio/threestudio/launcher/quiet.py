"""Keeps Lightning's chatter from the user: tips, availability tables, advice that cannot apply."""

import logging
import warnings

# Lines that are true and of no use: data comes from generators that need no workers, the loops are
# infinite by design, and checkpoints are ours.
_USELESS = (
    r".*does not have many workers.*",
    r".*GPU available but not used.*",
    r".*The number of training batches.*",
    r".*Be aware that when using `ckpt_path`.*",
    r".*Experiment logs directory .* exists and is not empty.*",
    r".*Found \d+ module\(s\) in eval mode.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*Starting from v1\.9\.0, `tensorboardX` has been removed.*",
    r".*You called `self\.log\(.*` in your `.*` but have no logger configured.*",
    r".*Trying to infer the `batch_size` from an ambiguous collection.*",
    r".*No positional arguments or `pytorch_lightning\.Trainer`.*",
    r".*predict returned None if it was on purpose.*",
    r".*The dataloader, .*, does not have many workers.*",
    r".*`IterableDataset` has `__len__` defined.*",
    r".*Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`.*",
)


def silence_lightning(verbose: bool = False) -> None:
    """Show warnings and errors of Lightning only; with ``verbose`` everything.

    Our own lines go to the logger "pytorch_lightning" itself, which keeps its level.
    """
    if verbose:
        return
    for pattern in _USELESS:
        warnings.filterwarnings("ignore", message=pattern)
    for name in list(logging.root.manager.loggerDict):
        parent, _, rest = name.partition(".")
        if parent in ("pytorch_lightning", "lightning") and rest or parent == "lightning_fabric":
            logging.getLogger(name).setLevel(logging.WARNING)
