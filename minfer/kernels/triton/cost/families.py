"""The families that are predicted, in the page's order. One of linear products joins by a table like `attention`'s."""

from __future__ import annotations

from minfer.kernels.triton.cost import attention
from minfer.kernels.triton.cost.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (attention.FAMILY,)}
