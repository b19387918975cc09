"""The ledger: one sealed JSON record per block, written last. A block without a valid record does not exist.

A record maps each array to an entry (`advkd.cache.format.array_record`): its chunk file's size and hashes, the range of
its values and the rounding error. It ends with its own hash (`advkd.cache.files.sealed_json`), so that a torn or edited
record is detected.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from advkd.cache.errors import DamagedError
from advkd.cache.files.durable import write_atomically
from advkd.cache.files.sealed_json import seal, seal_of, unseal, unsealed
from advkd.cache.files.strict_json import canonical_json, in_line
from advkd.cache.format.array_record import ArrayRecord
from advkd.cache.format.recipe import digest
from advkd.cache.format.store_paths import record_path

HOW_TO_FIX = "pull the block anew, or run `advkd-cache verify --repair` and `advkd-cache build` with the same settings"
FORMAT = 1
"""Of a record; stores of both formats have the same."""
_ARRAY_NAME = re.compile(r"[a-z0-9_-]+(/[a-z0-9_-]+)*")


class ArrayEntry(Protocol):
    """What a record says of one array: an `ArrayRecord`, or what a packed store has around one."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""

    @property
    def raw(self) -> ArrayRecord:
        """The array's entry in a raw store."""


Entry = TypeVar("Entry", bound=ArrayEntry)


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerRecord(Generic[Entry]):
    """The ledger's entry for one block: of a raw store (`BlockRecord`) or of a packed one."""

    maker: ClassVar[str]
    """The subcommand that makes a block again."""
    how_to_fix: ClassVar[str]
    """What to do about a damaged block."""
    block: int
    fingerprint: str
    layout_hash: str
    arrays: dict[str, Entry]
    """By array path, such as `states/0000`."""

    @classmethod
    def entry(cls, value: dict[str, Any]) -> Entry:
        """Read an array's entry.

        Raises:
            ValueError: it is no valid entry.
        """
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Plain JSON without the record's own hash."""
        return {
            "format": FORMAT,
            "block": self.block,
            "fingerprint": self.fingerprint,
            "layout_hash": self.layout_hash,
            "arrays": {name: array.to_json() for name, array in self.arrays.items()},
        }

    def unpacked(self, layout_hash: str) -> BlockRecord:
        """The block's record in the raw store of a layout."""
        return BlockRecord(
            block=self.block,
            fingerprint=self.fingerprint,
            layout_hash=layout_hash,
            arrays={name: array.raw for name, array in self.arrays.items()},
        )

    @property
    def further_names(self) -> tuple[str, ...]:
        """Paths of the arrays besides the states."""
        return tuple(sorted(name for name in self.arrays if not name.startswith("states/")))

    @property
    def record_hash(self) -> str:
        """sha256 of the record."""
        return digest(self.to_json())

    def write(self, store: Path) -> None:
        """Commit the block: from here on it exists."""
        write_atomically(store / record_path(self.block), [seal(self.to_json())])

    @classmethod
    def parse(cls, raw: bytes, block: int, where: str) -> Self:
        """Read a record's bytes.

        Raises:
            DamagedError: the record is torn, edited, or belongs to another block.
        """
        try:
            value = unseal(raw)
            if value["block"] != block or value["format"] != FORMAT:
                raise ValueError("it is of another block or format")
            if not all(_ARRAY_NAME.fullmatch(name) for name in value["arrays"]):
                raise ValueError("it names an array outside the store")
            record = cls(
                block=block,
                fingerprint=str(value["fingerprint"]),
                layout_hash=str(value["layout_hash"]),
                arrays={name: cls.entry(array) for name, array in value["arrays"].items()},
            )
            if seal(record.to_json()) != raw:
                raise ValueError("it is no canonical JSON")
            return record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _torn(where, block, error, cls.maker) from None


class BlockRecord(LedgerRecord[ArrayRecord]):
    """The entry for one block of a raw store."""

    __slots__ = ()
    maker = "build"
    how_to_fix = HOW_TO_FIX

    @classmethod
    def entry(cls, value: dict[str, Any]) -> ArrayRecord:
        """`ArrayRecord.from_json`."""
        return ArrayRecord.from_json(value)


def checked_seal(raw: bytes, block: int, fingerprint: str, layout_hash: str, where: str) -> str:
    """The hash that a record carries, checked against its bytes and its place without parsing them.

    Canonical JSON sorts its keys, so the members that say where a record belongs stand right before the hash.

    Raises:
        DamagedError: the record is torn, edited, or belongs elsewhere.
    """
    try:
        stated = seal_of(raw)
    except ValueError as error:
        raise _torn(where, block, error, BlockRecord.maker) from None
    place = {"block": block, "fingerprint": fingerprint, "format": FORMAT, "layout_hash": layout_hash}
    if not unsealed(raw).endswith(b"," + canonical_json(place)[1:-1]):
        raise DamagedError(f"{where}: the ledger record of block {block} belongs to another block or cache")
    return stated


def _torn(where: str, block: int, error: Exception, maker: str) -> DamagedError:
    return DamagedError(
        f"{where}: the ledger record of block {block} is torn or altered ({in_line(error)}); "
        f"`advkd-cache {maker}` with the same settings makes the block again"
    )


def content_digest(seals: list[tuple[int, str]]) -> str:
    """One hash that names the content of some committed blocks, for a paper or a model card.

    Args:
        seals: (block, its record's hash), ascending.
    """
    return hashlib.sha256(canonical_json(seals)).hexdigest()
