"""Which part of a whole tensor a rank stores."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import torch

# Type and shape of a tensor. Mapped over all tensors it runs no Python, and there are checkpoints of many thousands.
kind_of: Callable[[torch.Tensor], tuple[torch.dtype, torch.Size]] = attrgetter("dtype", "shape")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPart:
    """A box in a whole tensor. Its own shape is that of the stored tensor."""

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]  # one number a dimension
    stored_here: bool = True  # False: another rank stores the same bytes, or there are none
