"""Every error that advkd raises on purpose, grouped by what a caller can do about it.

    AdvkdError
    ├── UsageError (ValueError)             change the request; the command line exits with 2, with 1 for all others
    │   └── ConfigError                       … in the configuration file that the message names
    ├── TeacherError (RuntimeError)         choose another teacher or sampler: this one can't be loaded or evaluated
    ├── TrainingError (RuntimeError)        change the training's settings, or start a new run
    └── CacheError                          a store can't be used as asked:
        ├── CacheNotFoundError (FileNotFoundError)    build or pull it, or correct the path
        ├── NotACacheError (ValueError)       correct the path: something else is there, which was left as it was
        │   └── NewerCacheError                 upgrade advkd: the store is intact, a newer version wrote it
        ├── MismatchError (ValueError)        choose another store: this one has another recipe, layout or content
        ├── NotCachedError (LookupError)      build or pull the seed, state or array that the message names
        ├── DamagedError (ValueError)         `advkd-cache verify --repair`, build or pull: bytes differ from the ledger
        │   └── NeedsDamagedError               … those of a state from which this one is predicted
        └── LockedError (BlockingIOError)     wait for the other process, then try again

Each is also the built-in exception that a caller would catch. A message is one line: what was found, what was expected,
what to do. Only the command line turns errors into exit codes.
"""


class AdvkdError(Exception):
    """Base of all deliberate errors."""


class UsageError(AdvkdError, ValueError):
    """The request contradicts itself or what it applies to."""


class ConfigError(UsageError):
    """A configuration file has an unknown key or an invalid value."""


class TeacherError(AdvkdError, RuntimeError):
    """The teacher cannot be loaded, or its output is unusable."""


class TrainingError(AdvkdError, RuntimeError):
    """Training diverged, or cannot resume from what it found."""


class CacheError(AdvkdError):
    """A store cannot be used as asked."""


class CacheNotFoundError(CacheError, FileNotFoundError):
    """Nothing is at that path."""


class NotACacheError(CacheError, ValueError):
    """Something is there, but no trajectory cache that this version reads."""


class NewerCacheError(NotACacheError):
    """An intact trajectory cache of a newer advkd."""


class MismatchError(CacheError, ValueError):
    """The store has another recipe, layout or content than expected."""


class NotCachedError(CacheError, LookupError):
    """The store does not hold that seed, state or array."""


class DamagedError(CacheError, ValueError):
    """Bytes on disk differ from what the ledger records."""


class NeedsDamagedError(DamagedError):
    """A packed state can't be decoded because one that it is predicted from is damaged or absent."""


class LockedError(CacheError, BlockingIOError):
    """Another process holds the store."""


def first_line(error: BaseException, limit: int = 160) -> str:
    """What another library's error says first, short enough for a line of ours."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__
