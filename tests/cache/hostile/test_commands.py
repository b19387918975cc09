"""The command line on a hostile cache: one line and an exit code, and nothing that a terminal would obey."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from advkd.cache.files.locks import StoreLocks
from advkd.cache.files.sealed_json import seal
from advkd.cache.files.strict_json import pretty_json
from tests.cache.exercise import Mutant
from tests.cache.harm import Pristine
from tests.cache.mutations import make_consistent, mutated_stores
from tests.conftest import Invoke

CONTROLS = "\x1b[2J\x1b]0;owned\x07\r\n\u202e\u2028\x85\x9b31m"


def with_controls(pristine: Pristine) -> dict[str, bytes]:
    """A store that is sound but for its names and texts, which would rule a terminal."""
    root = json.loads(pristine.files["zarr.json"])
    recipe = root["attributes"]["advkd"]["recipe"]
    recipe["sampler"]["name"] = recipe["noise"]["rule"] = recipe["precision"]["compute"] = CONTROLS
    recipe["teacher"] |= {"tensors_sha256": CONTROLS, CONTROLS: CONTROLS}
    texts = {"source": CONTROLS, "commit": CONTROLS, "license": CONTROLS}
    files = make_consistent(pristine.files | {"zarr.json": pretty_json(root)})
    return files | {
        f"states/0002/c/1/0/0/{CONTROLS}": b"x",
        f"blocks/{CONTROLS}.json": b"x",
        f"provenance/{CONTROLS}": b"x",
        "states/\udcff\udcfe": b"x",
        "provenance/store.json": seal({"teacher": texts}),
        "provenance/writer.json": json.dumps({"pid": CONTROLS, "host": CONTROLS}).encode(),
    }


def commands(store: Path, like: Path) -> Iterator[tuple[str, ...]]:
    for name in ("info", "verify"):
        yield name, str(store)
    yield "info", str(store), "--json"
    yield "verify", str(store), "--json"
    yield "diff", str(store), str(like)
    yield "diff", str(like), str(store)
    yield "subset", str(store), "--states", "4", "--out", "part.zarr"
    yield "merge", str(store), str(like), "--out", "both.zarr"
    yield "verify", str(store), "--repair"


@pytest.fixture
def run_command(request: pytest.FixtureRequest) -> Invoke:
    """Where what the command line needs is installed."""
    pytest.importorskip("rich")
    invoke: Invoke = request.getfixturevalue("invoke")
    return invoke


def check_commands(invoke: Invoke, store: Path, like: Path) -> None:
    """Each command ends with what it has to say, or with one line and an exit code."""
    from advkd.pipeline.cli.cache import main

    for arguments in commands(store, like):
        result = invoke(main, *arguments)
        said = result.stdout + result.stderr
        assert all(letter.isprintable() or letter == "\n" for letter in said), (arguments, said)
        assert result.exit_code in (0, 1, 2)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == (1 if result.exit_code and not result.stdout else 0), (arguments, said)


def test_what_a_terminal_would_obey_is_escaped(
    run_command: Invoke, store: Path, like: Path, pristine: Pristine
) -> None:
    with pristine.harmed(with_controls(pristine)):
        check_commands(run_command, store, like)
        with StoreLocks(store).alone():
            from advkd.pipeline.cli.cache import main

            assert "another build is writing" in run_command(main, "verify", store, "--repair").stderr


def test_commands_end_with_a_line_whatever_the_metadata(run_command: Invoke, mutant: Mutant, like: Path) -> None:

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changed=mutated_stores(mutant.metadata))
    def run(changed: dict[str, bytes]) -> None:
        with mutant.pristine.harmed(changed) as store:
            check_commands(run_command, store, like)

    run()
