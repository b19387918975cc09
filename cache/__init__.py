"""The trajectory cache: the format, who writes it and who reads it.

Knows neither diffusers nor any model. `TrajectoryCache` reads, `CacheWriter` writes, and both obey the
ledger (`advkd.cache.ledger`). Importing this package imports neither torch nor zarr.
"""

from advkd.cache.noise import standard_normal
from advkd.cache.reader import TrajectoryCache
from advkd.cache.recipe import Layout, Recipe, State
from advkd.cache.writer import CacheWriter

__all__ = ["CacheWriter", "Layout", "Recipe", "State", "TrajectoryCache", "standard_normal"]
