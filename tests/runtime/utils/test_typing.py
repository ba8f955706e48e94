"""The star export that extensions rely on."""

import pytest
import torch

CONTRACT = (
    "Any Callable Dict Iterable List Literal NamedTuple NewType Optional Sized Tuple Type TypeVar "
    "Union Bool Complex Float Inexact Int Integer Num Shaped UInt DictConfig Tensor typechecker"
).split()


def test_star_import_brings_every_name_of_the_contract():
    namespace: dict = {}
    exec("from threestudio.utils.typing import *", namespace)
    assert set(CONTRACT) <= set(namespace)
    assert namespace["Tensor"] is torch.Tensor


def test_typechecker_checks():
    from threestudio.utils.typing import typechecker

    @typechecker
    def double(x: int) -> int:
        return 2 * x

    assert double(2) == 4
    with pytest.raises(Exception, match="not an instance of int"):
        double("a")
