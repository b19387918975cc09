"""Networks' weights in a store, each one safetensors file that is checked against the hash in the recipe: the decoder
of latents, and the teacher's own network where it was kept.
"""

from __future__ import annotations

from advkd.cache.errors import CacheError, DamagedError, NotCachedError
from advkd.cache.files.strict_json import in_line
from advkd.cache.format.recipe import Recipe
from advkd.cache.format.space import DECODER_PATH, LatentSpace
from advkd.cache.format.store_paths import TEACHER_PATH
from advkd.cache.format.tensor_file import tensors_sha256_of_file
from advkd.cache.read.contents import Contents

MAX_WEIGHTS_BYTES = 16 << 30


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
        data = cache.files.read(DECODER_PATH, MAX_WEIGHTS_BYTES)
    except FileNotFoundError:
        raise NotCachedError(
            f"{cache.address}: {DECODER_PATH} is not here, without which latents are no images: pull it, or run the "
            "`advkd-cache build` command that made the store, which writes it again"
        ) from None
    check_decoder(data, cache.recipe.space, f"{cache.address}/{DECODER_PATH}")
    return data


def teacher_weights(cache: Contents) -> bytes:
    """The safetensors file with the network of a cache's teacher, whole and checked.

    Raises:
        NotCachedError: it was not kept, or is not here.
        DamagedError: its tensors differ from what the recipe says.
    """
    try:
        data = cache.files.read(TEACHER_PATH, MAX_WEIGHTS_BYTES)
    except FileNotFoundError:
        raise NotCachedError(
            f"{cache.address}: {TEACHER_PATH} is not here: pull it, or run the `advkd-cache build` command that made "
            "the store with --keep-weights, which adds it"
        ) from None
    check_teacher(data, cache.recipe, f"{cache.address}/{TEACHER_PATH}")
    return data


def check_decoder(data: bytes, space: LatentSpace, where: str) -> None:
    """Check a decoder's file against what a recipe says.

    Raises:
        DamagedError: it differs.
    """
    _check(data, space.tensors_sha256, "decoder", where)


def check_teacher(data: bytes, recipe: Recipe, where: str) -> None:
    """Check a file with a teacher's network against what a recipe says.

    Raises:
        DamagedError: it differs.
    """
    _check(data, str(recipe.teacher["tensors_sha256"]), "teacher", where)


def _check(data: bytes, expected: str, what: str, where: str) -> None:
    try:
        found = tensors_sha256_of_file(data)
    except ValueError as error:
        raise DamagedError(f"{where} is damaged ({in_line(error)}): pull it again, or remove it and build") from None
    if found != expected:
        raise DamagedError(
            f"{where} holds another {what} than the recipe names (tensors {found[:12]}…, expected {expected[:12]}…): "
            "pull it again, or remove it and build"
        )
