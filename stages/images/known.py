"""The names of the labelled data sets, readable by a configuration without importing torch."""

from advkd.cache.errors import ConfigError

DATASETS = {"digits": 4, "mnist": 28}
"""Labelled real images that a package ships, and their smallest side in pixels."""


def check_dataset(name: str, size: int) -> None:
    """Check a data set's name and image size without loading it.

    Raises:
        ConfigError: no such data set, or the size is too small for it.
    """
    if name not in DATASETS:
        raise ConfigError(f"data {name!r} is unknown; known are {', '.join(DATASETS)}")
    if size < DATASETS[name]:
        raise ConfigError(f"data {name}: its images have {DATASETS[name]} pixels a side, {size} are too few")
