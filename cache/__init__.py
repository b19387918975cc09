"""The trajectory cache: its format, writing, reading and care. It knows neither diffusers nor any model.

`TrajectoryCache` reads and `CacheWriter` writes; both obey the ledger (`advkd.cache.format.ledger`), by which a block
exists only once its record does. Importing this package imports neither torch nor zarr.
"""

from advkd.cache.format.layout import Layout, State
from advkd.cache.format.noise import standard_normal
from advkd.cache.format.recipe import Recipe
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.writer import CacheWriter

__all__ = ["CacheWriter", "Layout", "Recipe", "State", "TrajectoryCache", "standard_normal"]
