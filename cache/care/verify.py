"""Every byte of a store against its ledger, every metadata file against the recipe.

Findings are named by file, block and state (`advkd.cache.care.findings`). An array that is absent as a whole is a
partial copy and no fault.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import google_crc32c

from advkd.cache.care.findings import Finding, Kind
from advkd.cache.care.metadata import StoreMetadata
from advkd.cache.care.strays import strays
from advkd.cache.errors import CacheError, DamagedError, NeedsDamagedError, NotCachedError
from advkd.cache.files.locks import LOCK_FILE, NOTE_FILE
from advkd.cache.files.paths import walk
from advkd.cache.files.sealed_json import unseal
from advkd.cache.files.strict_json import in_line
from advkd.cache.format.array_record import ArrayRecord, crc32c, with_crc
from advkd.cache.format.arrays import ArraySpec
from advkd.cache.format.condition import LABELS_PATH
from advkd.cache.format.seeds import seeds_of
from advkd.cache.format.space import DECODER_PATH
from advkd.cache.format.store_paths import TEACHER_PATH, provenance_path, record_path, states_path
from advkd.cache.format.zarr_metadata import CRC_BYTES, MAX_BLOCKS
from advkd.cache.read.compare import TOLERANCE_FILE, tolerance_of
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.read.weights import decoder_weights, teacher_weights

_PIECE = 4 << 20
_CRC_OF_ALL = crc32c(bytes(CRC_BYTES))
"""CRC of any bytes followed by their own CRC."""
STORE_FILE = "provenance/store.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """Result of a verification."""

    findings: tuple[Finding, ...]
    num_blocks: int
    num_bytes: int
    """Bytes of values that were read (from a packed store: decoded) and compared."""
    absent_states: tuple[str, ...]
    """Names of recorded states, and paths of other arrays, that this copy has not."""


def verify(cache: TrajectoryCache, checked: Callable[[int], None] = lambda num_bytes: None) -> Verified:
    """Compare every byte of a store with its ledger and recipe.

    Args:
        cache: local, or remote (where stray files can't be found).
        checked: called with the bytes of each chunk that was read.
    """
    return _Verification(cache, checked).run()


def bytes_to_verify(cache: TrajectoryCache) -> int:
    """Bytes of all chunks that `verify` reads."""
    per_block: int = sum(spec.block_bytes for spec in StoreMetadata(cache).here)
    return len(cache.blocks) * per_block


class _Verification:
    def __init__(self, cache: TrajectoryCache, checked: Callable[[int], None]) -> None:
        self.cache = cache
        self.checked = checked
        self.metadata = StoreMetadata(cache)  # first, so that a block which is added meanwhile is no finding
        self.findings: list[Finding] = []
        self.known: set[str] = {f"provenance/{LOCK_FILE}", f"provenance/{NOTE_FILE}"}
        self.seals: set[str] = set()
        """Hashes of the sealed files that are where they belong."""
        self.num_bytes = 0
        self.drawn_again = {states_path(state) for state in cache.layout.states if cache.is_drawn_again(state)}
        self.names = {states_path(state) for state in cache.layout.states} | set(cache.further_names)

    def run(self) -> Verified:
        cache, blocks = self.cache, self.metadata.blocks
        self.findings += self.metadata.findings()
        self.known |= self.metadata.files.keys()
        for block in blocks:
            self._block(block)
        self._store_provenance(STORE_FILE)
        self._store_provenance(TOLERANCE_FILE)
        self._teacher()
        if cache.recipe.space is not None:
            self._decoder()
        root = cache.files.root
        if root is not None:
            for folder in self.metadata.undescribed:
                self.known |= {folder + path for path in walk(root / folder)}
            self.findings += strays(root, self.known, self.seals, set(blocks))
        return Verified(
            findings=tuple(self.findings),
            num_blocks=len(blocks),
            num_bytes=self.num_bytes,
            absent_states=tuple(path.removeprefix("states/") for path in self.metadata.absent),
        )

    def _find(self, kind: Kind, file: str, problem: str, block: int | None = None, state: str | None = None) -> None:
        self.findings.append(Finding(kind=kind, file=file, problem=problem, block=block, state=state))

    def _block(self, block: int) -> None:
        cache, path = self.cache, record_path(block)
        self.known.add(path)
        self.known |= {spec.chunk_path(block) for spec in self.metadata.here if spec.path not in self.drawn_again}
        self._provenance(block)
        try:
            record = cache.record(block)
        except NotCachedError:
            return  # another process makes it anew just now
        except DamagedError as error:
            self._find("damage", path, _without_advice(error), block)
            for spec in self.metadata.here if cache.packed is None else ():
                self._chunk(spec, None, block)
            return
        if block >= MAX_BLOCKS:
            self._find("damage", path, f"no store has more than {MAX_BLOCKS:,} blocks", block)
        self.seals.add(record.record_hash)
        for spec in self.metadata.here:
            if spec.path not in record.arrays:
                self._find("damage", path, f"has no array {spec.path}, unlike the records of other blocks", block)
            elif not spec.fits(record.arrays[spec.path]):
                self._find("damage", path, f"its entry of {spec.path} doesn't fit {spec.metadata_path}", block)
            elif spec.path == LABELS_PATH and self._labels_sha256(block) not in (None, record.arrays[spec.path].sha256):
                self._find("damage", spec.chunk_path(block), "holds other labels than the recipe's rule gives", block)
            else:
                self._chunk(spec, record.arrays[spec.path], block)
        for name in sorted(record.arrays.keys() - self.names):
            problem = f"array {in_line(name)} is in the ledger record of this block, not in those of others"
            self._find("missing", f"{name}/c/{block}", problem, block)

    def _labels_sha256(self, block: int) -> str | None:
        """sha256 of a block's labels as the recipe's rule gives them; None where the array is all that says them."""
        condition = self.cache.recipe.condition
        if condition is None or condition.stored:
            return None
        labels = condition.labels_of(seeds_of(block, self.cache.layout.block_size))
        return hashlib.sha256(with_crc(labels.astype("<i4").tobytes())).hexdigest()

    def _decoder(self) -> None:
        self.known.add(DECODER_PATH)
        try:
            decoder_weights(self.cache)
        except NotCachedError:
            self._find("missing", DECODER_PATH, "is not there: without it latents are no images")
        except DamagedError:
            self._find("damage", DECODER_PATH, "is damaged, or another decoder than the recipe names")

    def _teacher(self) -> None:
        self.known.add(TEACHER_PATH)
        try:
            teacher_weights(self.cache)
        except NotCachedError:
            pass  # it is kept where somebody asked for it
        except DamagedError:
            self._find("damage", TEACHER_PATH, "is damaged, or another network than the recipe names")

    def _chunk(self, spec: ArraySpec, expected: ArrayRecord | None, block: int) -> None:
        """Compare a chunk with its record; without one, with the CRC that it ends with."""
        chunk, size = spec.chunk_path(block), expected.num_bytes if expected else spec.block_bytes + CRC_BYTES
        state = spec.path.removeprefix("states/") if spec.path.startswith("states/") else None
        try:
            num_bytes, digest, fits_itself = self._hash(chunk, size)
        except FileNotFoundError:
            if expected:
                self._find("missing", chunk, "is not there, but the ledger has it", block, state)
            return
        except NeedsDamagedError:
            return  # what it is predicted from is a finding of its own
        except (CacheError, OSError) as error:
            self._find("damage", chunk, _own_words(error, f"{self.cache.address}/{chunk}"), block, state)
            return
        self.num_bytes += num_bytes
        self.checked(num_bytes)
        if num_bytes != size:
            self._find("damage", chunk, f"has {num_bytes} bytes, the ledger says {size}", block, state)
        elif expected and digest != expected.sha256:
            self._find("damage", chunk, f"its sha256 is {digest[:12]}…, recorded {expected.sha256[:12]}…", block, state)
        elif not expected and not fits_itself:
            self._find("damage", chunk, "its own CRC doesn't match", block, state)

    def _hash(self, chunk: str, limit: int) -> tuple[int, str, bool]:
        """Size, sha256, and whether the CRC at the end fits: then the CRC of everything is a constant."""
        total, crc = hashlib.sha256(), 0
        with self.cache.source.open(chunk, limit) as file:
            num_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            while num_bytes <= limit and (piece := file.read(_PIECE)):
                total.update(piece)
                crc = google_crc32c.extend(crc, piece)
        return num_bytes, total.hexdigest(), crc == _CRC_OF_ALL

    def _provenance(self, block: int) -> None:
        path = provenance_path(block)
        self.known.add(path)
        try:
            note = self._unseal(path)
            if note.get("block", block) != block or note.keys() & {"arrays", "teacher", "rms"}:
                self._find("damage", path, "is of another block, or another file's", block)
        except FileNotFoundError:
            pass  # outside identity: a copy may come without it
        except (ValueError, DamagedError):
            self._find("damage", path, "is torn or altered", block)

    def _store_provenance(self, path: str) -> None:
        self.known.add(path)
        try:
            note = self._unseal(path)
            if path == TOLERANCE_FILE:
                tolerance_of(self.cache)
            elif note.keys() & {"arrays", "block", "rms"} or not isinstance(note.get("teacher", {}), dict):
                raise ValueError("it is another file's")
        except FileNotFoundError:
            pass
        except (ValueError, DamagedError):
            self._find("damage", path, "is torn or altered")

    def _unseal(self, path: str) -> dict[str, Any]:
        value = unseal(self.cache.source.read(path))
        self.seals.add(value["record_sha256"])
        return value


def _without_advice(error: DamagedError) -> str:
    return str(error).split(": ", 1)[-1].split(";")[0]


def _own_words(error: Exception, where: str) -> str:
    """What a packed store says of a file, without its address and without advice."""
    text = str(error)
    return text.removeprefix(where).split("; ")[0].strip() if text.startswith(where) else text
