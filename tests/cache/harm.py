"""A whole store with everything that one can have, and what can happen to its files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from advkd.cache.errors import CacheError
from advkd.cache.files.durable import write_atomically
from advkd.cache.files.sealed_json import seal
from advkd.cache.format.store_paths import provenance_path
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.writer import CacheWriter
from tests.stores import BLOCK_SIZE, block_states, make_layout, make_recipe, write_store

NUM_BLOCKS = 3
NOTES_OF_NOW = ("provenance/writer.lock", "provenance/writer.json")
"""Who writes at this moment: of no consequence when nobody does, and sealed by nothing."""
Harm = Mapping[str, bytes | None]
"""By file: what it holds afterwards; None where it is gone."""


def write_notes(store: Path) -> None:
    """The provenance that a build leaves."""
    for block in range(NUM_BLOCKS):
        note = {"block": block, "began": "2026-11-23T08:00:00+00:00", "host": "example", "seconds": 0.5}
        write_atomically(store / provenance_path(block), [seal(note)])
    origin = {"teacher": {"source": "team/teacher", "commit": None, "license": "apache-2.0"}}
    write_atomically(store / "provenance/store.json", [seal(origin)])
    write_atomically(store / "provenance/tolerance.json", [seal({"rms": {"0002": 2e-3, "0004": 3e-3}})])


def files_of(store: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def content(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """What a store's identity rests on."""
    return {path: data for path, data in files.items() if not path.startswith("provenance/")}


def block_of(path: str) -> int | None:
    """The block that a file is of, as a person would read its path."""
    found = re.fullmatch(r"(?:blocks/|provenance/block-)(\d{6})\.json|states/\d+/c/(\d+)/.*", path)
    return int(found[1] or found[2]) if found else None


def state_of(path: str) -> str | None:
    """The state that a file is of."""
    parts = path.split("/")
    return parts[1] if parts[0] == "states" and len(parts) > 2 else None


def rebuild(store: Path) -> list[int]:
    """Make what is missing again, as the next build would; which blocks that was."""
    layout = make_layout()
    writer = CacheWriter.open(store, make_recipe(), layout)
    with writer.writing():
        seeds = range(NUM_BLOCKS * BLOCK_SIZE)
        writer.grow(seeds)
        missing = writer.missing(seeds)
        for block in missing:
            writer.commit(block, block_states(layout, block))
    return missing


class Pristine:
    """A store that is as it was after every harm."""

    def __init__(self, root: Path) -> None:
        self.root = root
        write_store(root, f"0:{NUM_BLOCKS * BLOCK_SIZE}")
        write_notes(root)
        self.files = files_of(root)
        layout = make_layout()
        self.truth: dict[tuple[int, int], npt.NDArray[np.float16]] = {
            (step, block): values.astype(np.float16)
            for block in range(NUM_BLOCKS)
            for step, values in block_states(layout, block).items()
        }

    @property
    def names(self) -> list[str]:
        """Files whose bytes matter."""
        return [path for path in self.files if path not in NOTES_OF_NOW]

    @contextmanager
    def harmed(self, harm: Harm) -> Iterator[Path]:
        """The store with some files changed."""
        try:
            for path, data in harm.items():
                put(self.root / path, data)
            yield self.root
        finally:
            self.restore()

    def restore(self) -> None:
        """Put everything back."""
        found = files_of(self.root)
        for path in found.keys() - self.files.keys():
            (self.root / path).unlink()
        for path, data in self.files.items():
            if found.get(path) != data:
                put(self.root / path, data)

    def make_anew(self) -> None:
        """Put everything back, whatever is there."""
        put(self.root, None)
        for path, data in self.files.items():
            put(self.root / path, data)

    def check_never_silent(self) -> int:
        """Read every seed of every state by itself: the true bytes or an error; how many errors."""
        num_errors = 0
        try:
            cache = TrajectoryCache.open(self.root)
        except CacheError:
            return len(self.truth) * BLOCK_SIZE
        for (step, block), values in self.truth.items():
            for row in range(BLOCK_SIZE):
                try:
                    read = cache.rows(step, [block * BLOCK_SIZE + row])
                except CacheError:
                    num_errors += 1
                else:
                    assert read.tobytes() == values[row].tobytes()
        return num_errors


def put(path: Path, data: bytes | None) -> None:
    """Let a file hold some bytes, or be gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if data is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def flipped(data: bytes, bit: int) -> bytes:
    """Some bytes with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def state_of_folder(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything that writing below a folder would change."""
    return {
        str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns, path.lstat().st_ino, path.lstat().st_nlink)
        + ((path.read_bytes(),) if path.is_file() else ())
        for path in [folder, *folder.rglob("*")]
    }
