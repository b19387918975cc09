"""Publishes a cache as a data set of the Hub, which every command that reads a cache then opens by its address.

A block's files and its ledger record are in one commit, so that a reader never meets a record without its block. Files
that the Hub has already are not sent again: a push that was interrupted, or whose cache has grown, sends the rest.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advkd.cache.care.strays import block_of
from advkd.cache.errors import CacheError, UsageError, first_line
from advkd.cache.files.durable import PARTIAL_SUFFIX
from advkd.cache.files.locks import LOCK_FILE, NOTE_FILE
from advkd.cache.files.paths import walk
from advkd.cache.files.strict_json import parse_json
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.exchange.card import PREVIEW, cache_card, save_preview
from advkd.stages.reporter import Reporter

PREFIX = "hf://datasets/"
MAX_FILES, MAX_BYTES = 1000, 8 << 30
"""Of a commit; a larger block is a commit of its own."""
_ADDRESS = re.compile(rf"{PREFIX}([\w.-]+/[\w.-]+)/?", re.ASCII)
_OWN_NOTES = ("README.md", PREVIEW, ".gitattributes")


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was sent."""

    url: str
    num_commits: int
    num_files: int
    num_present: int
    """Files that the Hub had already."""


def push_cache(store: Path, address: str, reporter: Reporter, *, private: bool | None = None) -> Pushed:
    """Send what the Hub lacks of a cache.

    Args:
        store: the cache's folder.
        address: hf://datasets/OWNER/NAME; created if missing.
        reporter: shows progress.
        private: whether a new repository is private.

    Raises:
        UsageError: the address is no data set's, or holds something else.
        CacheError: the Hub is unreachable or refuses; what was sent stays.
    """
    named = _ADDRESS.fullmatch(address)
    if named is None:
        raise UsageError(f"{address} is no address of a data set: expected {PREFIX}OWNER/NAME")
    cache = TrajectoryCache.open(store)
    cache.check_begun()
    from huggingface_hub import HfApi

    api = HfApi()
    with _refusals(address):
        name = api.create_repo(named[1], repo_type="dataset", exist_ok=True, private=private).repo_id
        there = {
            entry.path: entry
            for entry in api.list_repo_tree(name, repo_type="dataset", recursive=True)
            if hasattr(entry, "blob_id")
        }
        if "zarr.json" in there:
            theirs = Path(api.hf_hub_download(name, "zarr.json", repo_type="dataset")).read_bytes()
    if "zarr.json" in there:
        _check_same(store, theirs, address)
    elif surplus := sorted(there.keys() - set(_OWN_NOTES)):
        raise UsageError(f"{address} holds {surplus[0]} but no cache: choose another name")
    with tempfile.TemporaryDirectory() as notes:
        save_preview(cache, Path(notes, PREVIEW))
        Path(notes, "README.md").write_text(cache_card(cache, address), encoding="utf-8")
        return _send(api, name, address, cache, store, Path(notes), there, reporter)


def _send(
    api: Any,
    name: str,
    address: str,
    cache: TrajectoryCache,
    store: Path,
    notes: Path,
    there: dict[str, Any],
    reporter: Reporter,
) -> Pushed:
    from huggingface_hub import CommitOperationAdd

    files = {path: store / path for path in walk(store) if _belongs(path, set(cache.blocks))}
    files |= {path.name: path for path in sorted(notes.iterdir())}
    todo = {path: file for path, file in files.items() if path not in there or not _is_same(file, there[path])}
    reporter.start("push", len(files), "files", done=len(files) - len(todo))
    num_commits = 0
    for part in _commits(todo):
        blocks = sorted({block for path in part if (block := block_of(path.split("/"))) is not None})
        what = f"Blocks {blocks[0]} to {blocks[-1]}" if blocks else "Metadata"
        operations = [CommitOperationAdd(path, str(file)) for path, file in part.items()]
        with _refusals(address):
            api.create_commit(name, operations, commit_message=what, repo_type="dataset")
        num_commits += 1
        reporter.advance(len(part), what)
    reporter.finish()
    return Pushed(
        url=f"https://huggingface.co/datasets/{name}",
        num_commits=num_commits,
        num_files=len(todo),
        num_present=len(files) - len(todo),
    )


def _belongs(path: str, committed: set[int]) -> bool:
    """Whether a file of a store is sent: not the remains of unfinished writes, nor blocks without a record."""
    if path.endswith(PARTIAL_SUFFIX) or path in (f"provenance/{LOCK_FILE}", f"provenance/{NOTE_FILE}"):
        return False
    block = block_of(path.split("/"))
    return block is None or block in committed


def _commits(todo: dict[str, Path]) -> Iterator[dict[str, Path]]:
    """Files in commits: what is of no block first, then whole blocks, as many as fit."""
    groups: dict[int, dict[str, Path]] = {}
    for path, file in todo.items():
        block = block_of(path.split("/"))
        groups.setdefault(-1 if block is None else block, {})[path] = file
    part: dict[str, Path] = {}
    size = 0
    for _, group in sorted(groups.items()):
        more = sum(file.stat().st_size for file in group.values())
        if part and (len(part) + len(group) > MAX_FILES or size + more > MAX_BYTES):
            yield part
            part, size = {}, 0
        part |= group
        size += more
    if part:
        yield part


def _is_same(file: Path, entry: Any) -> bool:
    """Whether a file on the Hub has these bytes, by the hash that the Hub keeps of it."""
    size = file.stat().st_size
    if size != entry.size:
        return False
    if entry.lfs is not None:
        with file.open("rb") as opened:
            return bool(hashlib.file_digest(opened, "sha256").hexdigest() == entry.lfs.sha256)
    # git's own name of a small file
    blob = hashlib.sha1(b"blob %d\0" % size + file.read_bytes(), usedforsecurity=False)
    return bool(blob.hexdigest() == entry.blob_id)


def _check_same(store: Path, theirs: bytes, address: str) -> None:
    """Refuse to mix two caches.

    Raises:
        UsageError: the Hub's is of another recipe or layout.
    """
    try:
        found, own = (parse_json(data)["attributes"]["advkd"] for data in (theirs, (store / "zarr.json").read_bytes()))
        same = all(found[key] == own[key] for key in ("fingerprint", "layout_hash"))
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UsageError(f"{address} holds another cache than {store}: choose another name")


class _refusals:  # noqa: N801 – used like a function
    """Errors of huggingface_hub, its HTTP library and the OS, each of which raises its own, as one line."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, CacheError | UsageError):
            line = first_line(error, 200)
            raise CacheError(f"the Hub did not accept {self._address} ({line}): push again") from error
