"""What compiled code cannot hold, like weights in a processor's own order, by numbers that it can."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Held:
    """Something that never changes: a copy of its owner shares it.

    Attributes:
        number: by which :func:`held` finds it for as long as it lives.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        _known[self.number] = self

    def __deepcopy__(self, memo: object) -> Held:
        return self


_known: WeakValueDictionary[int, Held] = WeakValueDictionary()
_numbers = itertools.count()

#: Of operators for compiled code; defined without the wrappers of ``torch.library.custom_op``, which take longer than
#: many a product.
OPERATORS = torch.library.Library("hma_gym", "FRAGMENT")


def held(number: Tensor) -> Any:
    """What has this number. Compiled code is given it as a tensor, so that what was made for one serves others."""
    return _known[int(number)]
