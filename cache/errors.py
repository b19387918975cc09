"""Every error that advkd raises on purpose.

    AdvkdError
    ├── UsageError (ValueError)             the request itself is wrong: exit code 2
    │   └── ConfigError                       … and it stands in a configuration file
    ├── TeacherError (RuntimeError)         the teacher can't be loaded or gave unusable output
    ├── TrainingError (RuntimeError)        training diverged or cannot go on
    └── CacheError                          something about a store
        ├── CacheNotFoundError (FileNotFoundError)
        ├── NotACacheError (ValueError)       a folder, but not one of ours
        ├── MismatchError (ValueError)        a cache of another recipe or layout
        ├── NotCachedError (LookupError)      a seed or state that this store does not hold
        ├── DamagedError (ValueError)         bytes that differ from the ledger
        │   └── NeedsDamagedError                 … of what a packed state is predicted from
        └── LockedError (BlockingIOError)     another process is writing

Grouped by what a handler would do; each is also the built-in that a caller would catch. A message is one line:
what was found, what was expected, what to do. Only the command line turns them into exit codes.
"""


class AdvkdError(Exception):
    """Base of all deliberate errors."""


class UsageError(AdvkdError, ValueError):
    """The request cannot be meant as it stands."""


class ConfigError(UsageError):
    """A configuration file has an unknown key or an impossible value."""


class TeacherError(AdvkdError, RuntimeError):
    """The teacher cannot be loaded, or its output is unusable."""


class TrainingError(AdvkdError, RuntimeError):
    """Training diverged, or cannot go on from what it found."""


class CacheError(AdvkdError):
    """Something is wrong with a store."""


class CacheNotFoundError(CacheError, FileNotFoundError):
    """Nothing is at that path."""


class NotACacheError(CacheError, ValueError):
    """A folder is there, but it is no trajectory cache."""


class MismatchError(CacheError, ValueError):
    """The store was made by another recipe, or laid out otherwise."""


class NotCachedError(CacheError, LookupError):
    """The store does not hold that seed or state."""


class DamagedError(CacheError, ValueError):
    """Bytes on disk differ from what the ledger records."""


class NeedsDamagedError(DamagedError):
    """A packed state can't be decoded because one that it is predicted from is damaged or not here."""


class LockedError(CacheError, BlockingIOError):
    """Another process is writing to the store."""
