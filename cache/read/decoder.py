"""The decoder of a store of latents: one safetensors file in the store, checked against the hash in its recipe."""

from __future__ import annotations

from advkd.cache.errors import CacheError, DamagedError, NotCachedError
from advkd.cache.files.strict_json import in_line
from advkd.cache.format.space import DECODER_PATH, LatentSpace
from advkd.cache.format.tensor_file import tensors_sha256_of_file
from advkd.cache.read.contents import Contents

MAX_DECODER_BYTES = 4 << 30


def decoder_weights(cache: Contents) -> bytes:
    """The safetensors file with a cache's decoder, whole and checked.

    Raises:
        NotCachedError: it is not here.
        DamagedError: its tensors differ from what the recipe says.
        CacheError: the cache holds pixels, which need no decoder.
    """
    if cache.recipe.space is None:
        raise CacheError(f"{cache.address} holds pixels, which need no decoder")
    try:
        data = cache.files.read(DECODER_PATH, MAX_DECODER_BYTES)
    except FileNotFoundError:
        raise NotCachedError(
            f"{cache.address}: {DECODER_PATH} is not here, without which latents are no images: pull it, or run the "
            "`advkd-cache build` command that made the store, which writes it again"
        ) from None
    check_decoder(data, cache.recipe.space, f"{cache.address}/{DECODER_PATH}")
    return data


def check_decoder(data: bytes, space: LatentSpace, where: str) -> None:
    """Check a decoder's file against what a recipe says.

    Raises:
        DamagedError: it differs.
    """
    try:
        found = tensors_sha256_of_file(data)
    except ValueError as error:
        raise DamagedError(f"{where} is damaged ({in_line(error)}): pull it again, or remove it and build") from None
    if found != space.tensors_sha256:
        raise DamagedError(
            f"{where} holds another decoder than the recipe names (tensors {found[:12]}…, expected "
            f"{space.tensors_sha256[:12]}…): pull it again, or remove it and build"
        )
