"""transformers, imported when it is first needed: the extra `text`."""

from __future__ import annotations

from typing import Any

from advkd.cache.errors import UsageError


def transformers(what: str) -> Any:
    """The library, without its progress bars and warnings.

    Args:
        what: needs it, for the message.

    Raises:
        UsageError: it isn't installed.
    """
    try:
        import transformers as library
    except ImportError:
        raise UsageError(f"{what} needs transformers: pip install 'advkd[text]'") from None
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
    return library
