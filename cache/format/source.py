"""Where a store's files come from: a local folder, or anything that fsspec reads.

`advkd.cache.codec.unpacked_source` adds a third kind, the raw store that a packed one decodes to. Only a local folder
can be listed, so the blocks of other stores are enumerated from what their arrays declare, which works over plain HTTP.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from advkd.cache.errors import CacheError, CacheNotFoundError, DamagedError, UsageError, first_line
from advkd.cache.files.paths import MAX_METADATA_BYTES, open_file, read_bounded, safe_folder
from advkd.cache.format.store_paths import block_of_record, record_path
from advkd.cache.format.zarr_metadata import MAX_BLOCKS

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_AT_ONCE = 256
_MAX_NAMED = 3


def is_url(address: str | Path) -> bool:
    """Whether an address is a URL, not a path."""
    return bool(_URL.match(str(address)))


class Source(Protocol):
    """The files of a store, by path relative to it."""

    address: str
    """As the user gave it."""

    @property
    def root(self) -> Path | None:
        """The folder that holds the files; None if they come over a network or are decoded when they are read."""

    def read(self, path: str, limit: int = MAX_METADATA_BYTES) -> bytes:
        """A whole file; FileNotFoundError if it is absent, DamagedError if it is larger than `limit`."""

    def open(self, path: str, limit: int) -> BinaryIO:
        """A file to read piece by piece; raises as `read`, except that a local file may exceed `limit`."""

    def read_many(self, paths: Sequence[str]) -> Iterator[bytes | None]:
        """Whole small files in order, None for each that is absent."""

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks that have a ledger record, ascending."""


class WholeFileSource:
    """A source's other methods, given `read`, if it has no folder."""

    address: str
    root: Path | None = None

    def read(self, path: str, limit: int = MAX_METADATA_BYTES) -> bytes:
        """A whole file."""
        raise NotImplementedError

    def open(self, path: str, limit: int) -> BinaryIO:
        """A whole file in memory."""
        return io.BytesIO(self.read(path, limit))

    def read_many(self, paths: Sequence[str]) -> Iterator[bytes | None]:
        """Whole small files in order, None for each that is absent."""
        for path in paths:
            try:
                yield self.read(path)
            except FileNotFoundError:
                yield None

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks that have a ledger record: asks for each that is declared, since not every source can list."""
        records = self.read_many([record_path(block) for block in range(num_blocks)])
        return tuple(block for block, raw in enumerate(records) if raw is not None)


def too_large(where: str, limit: int) -> DamagedError:
    """The error for a file that exceeds any valid size."""
    return DamagedError(f"{where} has more than {limit:,} bytes, the most that it can have in a cache")


class LocalSource(WholeFileSource):
    """A folder."""

    def __init__(self, root: Path) -> None:
        self.root: Path = root
        self.address = str(root)
        self._checked: set[str] = set()

    def _check_folder(self, path: str) -> None:
        """Refuse a file whose folder is reached through a symlink; each folder is checked once."""
        folder = path.rpartition("/")[0]
        if folder not in self._checked:
            safe_folder(self.root, folder)
            if not (self.root / folder).exists():
                raise FileNotFoundError(self.root / path)
            self._checked.add(folder)

    def read(self, path: str, limit: int = MAX_METADATA_BYTES) -> bytes:
        """A whole file."""
        self._check_folder(path)
        return read_bounded(self.root, path, limit)

    def open(self, path: str, limit: int) -> BinaryIO:
        """The file itself, so that it can be mapped, too."""
        self._check_folder(path)
        return open(open_file(self.root, path), "rb")

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks that have a ledger record: one listing, however many seeds are declared."""
        try:
            self._check_folder("blocks/")
            with os.scandir(self.root / "blocks") as entries:
                found = (block_of_record(entry.name) for entry in entries)
                return tuple(sorted(block for block in found if block is not None and block < num_blocks))
        except (FileNotFoundError, NotADirectoryError):
            return ()


class RemoteSource(WholeFileSource):
    """A store at a URL that fsspec reads: `s3://`, `gs://`, `hf://`, `http(s)://` and others."""

    def __init__(self, url: str) -> None:
        self.address = url
        try:
            import fsspec
        except ImportError:  # pragma: no cover – torch and huggingface_hub depend on it
            raise UsageError(f"{url}: reading URLs needs fsspec: pip install 'advkd[remote]'") from None
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url.rstrip("/"))
        except ImportError as error:
            raise UsageError(f"{url}: {first_line(error)}; pip install 'advkd[remote]'") from None
        except ValueError as error:
            raise UsageError(f"{url}: {first_line(error)}") from None
        self._records: dict[str, bytes] = {}

    def read(self, path: str, limit: int = MAX_METADATA_BYTES) -> bytes:
        """A whole file."""
        data = self._records.get(path) or next(self._cat([path]))
        if data is None:
            raise FileNotFoundError(f"{self.address}/{path}")
        if len(data) > limit:
            raise too_large(f"{self.address}/{path}", limit)
        return data

    def read_many(self, paths: Sequence[str]) -> Iterator[bytes | None]:
        """Whole small files in order, many requests at a time."""
        return self._cat(paths)

    def _cat(self, paths: Sequence[str]) -> Iterator[bytes | None]:
        for start in range(0, len(paths), _AT_ONCE):
            names = [f"{self._root}/{path}" for path in paths[start : start + _AT_ONCE]]
            try:
                found: Any = self._fs.cat(names, on_error="return")
            except FileNotFoundError:
                found = {}
            except Exception as error:  # remote libraries raise exceptions of their own
                raise CacheError(f"{self.address} can't be read ({first_line(error)})") from error
            if isinstance(found, bytes):
                found = {names[0]: found}
            by_name = {self._fs._strip_protocol(name): value for name, value in found.items()}
            for name in names:
                value = by_name.get(self._fs._strip_protocol(name))
                if isinstance(value, Exception) and not isinstance(value, FileNotFoundError):
                    raise CacheError(f"{self.address} can't be read ({first_line(value)})") from value
                yield value if isinstance(value, bytes) else None

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks that have a ledger record; keeps the records, which are asked for again soon."""
        paths = [record_path(block) for block in range(num_blocks)]
        self._records = {path: raw for path, raw in zip(paths, self._cat(paths), strict=True) if raw is not None}
        return tuple(block for block, path in enumerate(paths) if path in self._records)


def open_source(address: str | Path) -> Source:
    """The source at a path or URL.

    Raises:
        CacheNotFoundError: nothing is at the local path.
        UsageError: support for this kind of URL isn't installed.
    """
    if is_url(address):
        return RemoteSource(str(address))
    path = Path(address)
    if not path.exists():
        others = [other.name for other in sorted(path.parent.glob("*.zarr"))[:_MAX_NAMED]]
        raise CacheNotFoundError(
            f"no cache at {path}: `advkd-cache build --config FILE --out {path}` makes one, `dvc pull {path}` fetches "
            f"a shared one{'; beside it are ' + ', '.join(others) if others else ''}"
        )
    return LocalSource(path)


def check_num_blocks(address: str, num_seeds: int, block_size: int) -> None:
    """Refuse a header that declares partial blocks or more blocks than any store has.

    Raises:
        DamagedError: it does.
    """
    if num_seeds % block_size or num_seeds // block_size > MAX_BLOCKS:
        raise DamagedError(
            f"{address} declares {num_seeds:,} seeds in blocks of {block_size:,}: expected whole blocks, at most "
            f"{MAX_BLOCKS:,} of them"
        )
