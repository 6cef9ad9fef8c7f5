"""The parameter table: what is known of each parameter of a model before it holds a number."""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """One row of the parameter table: all that sharding, optimizers and conversion need."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    logical_axes: tuple[str | None, ...]   # leading "layers" for stacked parameters
    units: tuple[int, ...]                 # what each dim counts (heads, not heads * head_dim)
    fan_in: int
    init: str

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)
