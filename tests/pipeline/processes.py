"""Real processes for tests: the commands as they are installed, waited for with a deadline, stopped and killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
DEADLINE = 120.0

Process = subprocess.Popen[str]


def start(folder: Path, *command: object, session: bool = False, **environment: str) -> Process:
    """Start a command in a folder; in a process group of its own, if wanted."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=session,
        preexec_fn=_listen_to_ctrl_c,
    )


def _listen_to_ctrl_c() -> None:
    """Where the tests themselves run in the background, a shell has told all children to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(condition: Callable[[], object], process: Process | None = None) -> None:
    """Wait for something that a process, if one is named, brings about."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if process is not None:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(process: Process) -> tuple[str, str]:
    """Wait for a process that does well; its output and errors."""
    output, error = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, error
    return output, error


def stop(process: Process, number: int) -> tuple[int, str]:
    """Send a signal and wait; the exit code and errors."""
    process.send_signal(number)
    _, error = process.communicate(timeout=DEADLINE)
    return process.returncode, error


def without_progress(error: str) -> list[str]:
    """Its lines, without the one per minute that says how far a long command is: a busy machine has more of them."""
    return [line for line in error.splitlines() if not re.match(r"\w+: [\d,]+ of [\d,]+ ", line)]


def committed(store: Path) -> list[int]:
    """Blocks with a ledger record, in whatever state the store is."""
    return sorted(int(path.stem) for path in store.glob("blocks/*.json"))


def makers(store: Path) -> dict[int, dict[str, object]]:
    """By block, the provenance of who made it."""
    return {
        block: json.loads((store / f"provenance/block-{block:06d}.json").read_bytes()) for block in committed(store)
    }


def num_built(output: str) -> int:
    """How many blocks a build said that it made."""
    return int(output.partition("built ")[2].split()[0])
