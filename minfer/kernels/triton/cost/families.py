"""The families that are predicted, in the page's order."""

from __future__ import annotations

from minfer.kernels.triton.cost import attention, linear, moe
from minfer.kernels.triton.cost.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (attention.FAMILY, linear.FAMILY, moe.FAMILY)}
