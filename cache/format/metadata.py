"""Reading a store's metadata: recipe, layout and the seeds that its arrays declare, checked against each other."""

from __future__ import annotations

from advkd.cache.errors import CacheNotFoundError, DamagedError, NewerCacheError, NotACacheError
from advkd.cache.files.strict_json import in_line, parse_json
from advkd.cache.format.layout import Layout, State
from advkd.cache.format.recipe import CONDITIONAL_FORMAT, FORMAT, Recipe, digest
from advkd.cache.format.source import Source, check_num_blocks
from advkd.cache.format.store_paths import metadata_path, states_path
from advkd.cache.format.zarr_metadata import array_metadata

_NOT_JSON_OF_OURS = (ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError)


def read_metadata(source: Source) -> tuple[Recipe, Layout]:
    """Read and check a store's root metadata.

    Raises:
        CacheNotFoundError: nothing is at the URL.
        NewerCacheError: an intact store of a newer advkd is there.
        NotACacheError: something else is there.
        DamagedError: recipe or layout differ from their hashes.
    """
    address = source.address
    try:
        value = parse_json(source.read("zarr.json"))["attributes"]["advkd"]
        found_format = value["format"]
    except DamagedError as error:
        raise NotACacheError(f"{address} is not a trajectory cache ({error}); nothing was changed") from None
    except (OSError, *_NOT_JSON_OF_OURS) as error:
        if isinstance(error, FileNotFoundError) and source.root is None:
            raise CacheNotFoundError(f"no cache at {address}: there is no zarr.json") from None
        raise NotACacheError(
            f"{address} is not a trajectory cache (no zarr.json of one); nothing was changed"
        ) from None
    if type(found_format) is not int or found_format not in (FORMAT, CONDITIONAL_FORMAT):
        is_newer = type(found_format) is int and found_format > CONDITIONAL_FORMAT
        raise (NewerCacheError if is_newer else NotACacheError)(
            f"{address}/zarr.json has cache format {in_line(found_format, 20)}; this advkd reads formats {FORMAT} and "
            f"{CONDITIONAL_FORMAT}: upgrade advkd"
        )
    if isinstance(value.get("layout"), dict) and "encoding" not in value["layout"]:
        raise NotACacheError(
            f"{address}/zarr.json is a draft that preceded format 1, which no version of advkd reads: build the cache "
            "again with `advkd-cache build`"
        )
    try:
        # The hashes are those of the JSON as it is, so that they also tell a newer store from an altered one.
        intact = value["fingerprint"] == digest(value["recipe"]) and value["layout_hash"] == digest(value["layout"])
        if intact:
            recipe, layout = Recipe.from_json(value["recipe"]), Layout.from_json(value["layout"])
            intact = (recipe.fingerprint, layout.layout_hash) == (value["fingerprint"], value["layout_hash"])
            intact = intact and recipe.format == found_format
            intact = intact and layout.block_bytes(recipe.item_shape) <= layout.max_block_bytes
            if recipe.prompts is not None and layout.block_size % recipe.prompts.seeds_per_prompt:
                raise NotACacheError(f"its blocks of {layout.block_size} seeds divide the seeds of a prompt")
    except NotACacheError as error:
        raise type(error)(f"{address}/zarr.json: {error}") from None
    except _NOT_JSON_OF_OURS:
        intact = False
    if not intact:
        raise DamagedError(f"{address}/zarr.json was altered: its recipe or layout doesn't match its own hash")
    return recipe, layout


def read_arrays(source: Source, recipe: Recipe, layout: Layout) -> tuple[dict[int, State], int]:
    """The recorded states that are present, by solver steps done, and the number of seeds that all of them declare.

    Raises:
        DamagedError: an array's metadata differ from what the recipe generates, or declare too many seeds.
    """
    declared: list[int] = []
    present: dict[int, State] = {}
    paths = [metadata_path(states_path(state)) for state in layout.states]
    for state, path, raw in zip(layout.states, paths, source.read_many(paths), strict=True):
        if raw is None:
            continue  # a partial copy without that state
        try:
            metadata = parse_json(raw)
            num_seeds = metadata["shape"][0]
            fitting = type(num_seeds) is int and metadata == array_metadata(recipe, layout, state, num_seeds)
        except _NOT_JSON_OF_OURS:
            fitting = False
        if not fitting or num_seeds < 0:
            raise DamagedError(f"{source.address}/{path} doesn't fit the recipe in {source.address}/zarr.json")
        check_num_blocks(f"{source.address}/{path}", num_seeds, layout.block_size)
        declared.append(num_seeds)
        present[state.step] = state
    # A crash while growing leaves some arrays larger; all arrays have the smallest size.
    return present, min(declared, default=0)
