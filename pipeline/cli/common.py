"""What all commands share: exit codes for errors, a clean stop on signals, common options."""

from __future__ import annotations

import functools
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, ParamSpec

import click

from advkd.cache.errors import AdvkdError, UsageError
from advkd.pipeline.memory import keep_freed_memory

P = ParamSpec("P")
INTERRUPTED = 130


class Interrupted(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C."""


class Resumable(KeyboardInterrupt):
    """Ctrl-C in work that goes on where it was stopped, whatever else its command does."""


@contextmanager
def keeping() -> Iterator[None]:
    """Such work, in a command that otherwise keeps nothing before it finishes."""
    try:
        yield
    except KeyboardInterrupt:
        raise Resumable from None


def _terminate(signum: int, frame: object) -> NoReturn:
    raise Interrupted


def command_line() -> str:
    """The command as typed, for records and suggestions."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def guarded(function: Callable[P, None], *, resumes: bool = True) -> Callable[P, None]:
    """Turn errors into one line and an exit code: 2 for a usage error, 1 for a failure, 130 when interrupted.

    Also adds `--version`.

    Args:
        function: the command's function.
        resumes: whether the same command resumes after an interruption.
    """
    kept = "; what was committed before is kept" if resumes else ""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        signal.signal(signal.SIGTERM, _terminate)
        keep_freed_memory()
        try:
            function(*args, **kwargs)
        except AdvkdError as error:
            _fail(str(error), 2 if isinstance(error, UsageError) else 1)
        except (MemoryError, RecursionError) as error:
            _fail(f"{type(error).__name__}: the request is too large for this machine; a smaller batch may fit", 1)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower() and "not enough memory" not in str(error).lower():
                raise
            _fail(f"{str(error).splitlines()[0][:160]}: a smaller batch may fit", 1)
        except BrokenPipeError:
            raise  # `| head` has read enough: click ends quietly
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            _fail(f"{error.strerror or error}{where}{kept}", 1)
        except KeyboardInterrupt as stop:
            goes_on = resumes or isinstance(stop, Resumable)
            again = "; what was committed is kept. To resume" if goes_on else ". To start again"
            click.echo(f"\nstopped{again}: {command_line()}", err=True)
            sys.exit(INTERRUPTED)

    return click.version_option(package_name="advkd", message="%(prog)s %(version)s")(wrapper)


all_or_nothing = functools.partial(guarded, resumes=False)
"""`guarded` for commands that keep nothing before they finish."""


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {printable(' '.join(message.split()))}", err=True)
    sys.exit(code)


def printable(text: object) -> str:
    """Text from a file that may be hostile, with the control characters escaped that could take over the terminal."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in str(text))


def store_name(address: str) -> str:
    """Name for files derived from a store: the last part of its path or URL, without `.zarr`."""
    return PurePosixPath(address.split("?")[0].rstrip("/")).name.removesuffix(".zarr") or "cache"


def parse_steps(flag: str, text: str) -> list[int]:
    """Parse a list of solver steps such as 0,10,50.

    Raises:
        UsageError: the text is not such a list.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} {text!r}: expected solver steps such as 0,10,50") from None


def example(text: str) -> str:
    """Help epilog with an example, which click does not rewrap."""
    return f"\b\nExample:\n  {text}"


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

set_option: Decorator = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change a key of the configuration, such as train.steps=500; may be given several times.",
)


def config_option(otherwise: str) -> Decorator:
    """`--config`, whose help says what holds without it, and `--set`; passed as `config` and `overrides`."""
    config: Decorator = click.option(
        "--config",
        metavar="FILE",
        help=f"Experiment: a YAML or JSON file, or a shipped name such as digits or cifar10 (default: {otherwise}).",
    )
    return lambda function: config(set_option(function))
