"""The list of prompts that a cache is built over: a prompt per line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from advkd.cache.errors import MismatchError, UsageError
from advkd.cache.format.prompts import Prompt
from advkd.cache.format.seeds import blocks_of, parse_seed_range
from advkd.cache.read.prompts import StoredPrompts, first_difference
from advkd.stages.images.datasets import DATASETS
from advkd.stages.teacher.config import AUTO, DEFAULT_SEEDS, CacheConfig

JSON_LINES = ".jsonl"


@dataclass(frozen=True, kw_only=True)
class PromptList:
    """Prompts in order, and the lines that they stand in; blank lines are skipped."""

    path: Path
    prompts: tuple[Prompt, ...]
    lines: tuple[int, ...]
    """Counted from 1."""

    @classmethod
    def read(cls, path: str | Path) -> PromptList:
        """Read a text file with a prompt per line, or a `.jsonl` file with the keys `prompt` and `negative`.

        The name of a data set whose images have names stands for those.

        Raises:
            UsageError: it can't be read, has no prompt, or a line that is none or too long.
        """
        named = DATASETS[str(path)].names if str(path) in DATASETS else None
        path, prompts, lines = Path(path), [], []
        if named is not None:
            texts = [name for name in named() if name]
            prompts = [Prompt(text=name) for name in texts]
            return cls(path=path, prompts=tuple(prompts), lines=tuple(range(1, len(texts) + 1)))
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"prompts {path} can't be read ({error}); expected text in UTF-8") from None
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                prompt = _from_json(line) if path.suffix == JSON_LINES else Prompt(text=line.strip())
                prompt.to_row()
            except UsageError as error:
                raise UsageError(f"{path}, line {number}: {error}") from None
            prompts.append(prompt)
            lines.append(number)
        if not prompts:
            raise UsageError(f"prompts {path} are none: expected a prompt per line")
        return cls(path=path, prompts=tuple(prompts), lines=tuple(lines))

    @classmethod
    def stored(cls, stored: StoredPrompts, store: Path) -> PromptList:
        """The list that a store has, with empty prompts where a block is not there.

        Raises:
            DamagedError: bytes differ from the ledger.
        """
        numbers = stored.committed.tolist()
        known = dict(zip(numbers, stored.texts(numbers), strict=True))
        prompts = [known.get(number, Prompt(text="")) for number in range(max(numbers, default=-1) + 1)]
        return cls(path=store, prompts=tuple(prompts), lines=tuple(range(1, len(prompts) + 1)))

    def check_continues(self, stored: StoredPrompts, store: Path) -> None:
        """Refuse a list that changed otherwise than by growing at its end.

        Raises:
            MismatchError: a stored prompt differs from the list's.
        """
        number = first_difference(stored, self.prompts)
        if number is not None:
            (there,) = stored.texts([number])
            raise MismatchError(
                f"{self.path}, line {self.lines[number]}: {self.prompts[number].text[:60]!r}, but {store} was built "
                f"with {there.text[:60]!r}; a list may only grow at its end: choose another --out"
            )


def requested_seeds(config: CacheConfig, prompts: PromptList | None = None) -> range:
    """The seeds that a configuration asks for, not widened to whole blocks yet.

    Args:
        config: of the cache.
        prompts: its list, which is read if it isn't given.

    Raises:
        UsageError: the prompts fill no block, or not all that were asked for.
    """
    if config.prompts is None:
        return parse_seed_range(DEFAULT_SEEDS if config.seeds == AUTO else config.seeds)
    prompts = prompts or PromptList.read(config.prompts)
    count, size = len(prompts.prompts) * config.seeds_per_prompt, config.block_size
    whole = count // size * size
    listed = f"{len(prompts.prompts)} prompts with {config.seeds_per_prompt} seeds each"
    if config.seeds == AUTO:
        if not whole:
            raise UsageError(f"{listed} fill no block of {size}: --block-size {count} would do")
        return range(whole)
    seeds = parse_seed_range(config.seeds)
    if blocks_of(seeds, size).stop * size > whole:
        raise UsageError(f"seeds {config.seeds}: {listed} fill the blocks of {size} up to seed {whole}")
    return seeds


def left_out(config: CacheConfig, prompts: PromptList) -> str | None:
    """In words, which prompts at the end of a list fill no whole block; None if all do, or seeds were asked for."""
    count, size, each = len(prompts.prompts) * config.seeds_per_prompt, config.block_size, config.seeds_per_prompt
    if config.seeds != AUTO or not count % size:
        return None
    fitting = next(parts for parts in range(-(-count // size), count + 1) if not count % (parts * each))
    return (
        f"the last {count % size // each} of {len(prompts.prompts)} prompts fill no whole block of {size} seeds and "
        f"are left out; --block-size {count // fitting} takes all"
    )


def _from_json(line: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    known = isinstance(value, dict) and "prompt" in value and not value.keys() - {"prompt", "negative"}
    if not known or not all(isinstance(part, str) for part in value.values()):
        raise UsageError(
            f'{line[:40]!r} is no prompt; expected {{"prompt": "…", "negative": "…"}}, the latter optional'
        )
    return Prompt(text=value["prompt"], negative=value.get("negative", ""))
