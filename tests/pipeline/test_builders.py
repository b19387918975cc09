"""Several `advkd-cache build` of one store at the same time, with no scheduler: they divide the blocks."""

import os
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from advkd.cache.care.verify import verify
from advkd.cache.files.locks import StoreLocks
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.teacher.build.build import build
from tests.pipeline.plans import Listener, plan_for
from tests.pipeline.processes import Process, committed, finish, makers, num_built, start, wait_until
from tests.stores import block_states, tree, write_store

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 100


def on_another_host(name: str, *command: object) -> tuple[object, ...]:
    """A command that sees another host's name, where this system lets us."""
    possible = (
        shutil.which("unshare") and subprocess.run(["unshare", "-u", "true"], capture_output=True).returncode == 0
    )
    return ("unshare", "-u", "sh", "-c", f'hostname {name}; exec "$@"', "sh", *command) if possible else command


def command(teacher: Path, seeds: str) -> tuple[object, ...]:
    settings = ("--steps", STEPS, "--record", 2, "--block-size", 4, "--batch-size", 4, "--out", "toy.zarr")
    return ("advkd-cache", "build", "--teacher", teacher, "--seeds", seeds, *settings)


def test_two_hosts_that_begin_together_divide_the_blocks(tmp_path: Path, pipeline_folder: Path) -> None:
    """No store is there: both create it. One is told less, and ends when its own blocks are there."""
    store = tmp_path / "toy.zarr"
    builders = [
        start(tmp_path, *on_another_host("north", *command(pipeline_folder, "0:80"))),
        start(tmp_path, *on_another_host("south", *command(pipeline_folder, "0:64"))),
    ]
    outputs = [finish(builder)[0] for builder in builders]
    made = makers(store)
    assert sum(num_built(output) for output in outputs) == 20
    assert {maker["pid"] for maker in made.values()} == {builder.pid for builder in builders}
    for builder, output in zip(builders, outputs, strict=True):
        assert num_built(output) == sum(maker["pid"] == builder.pid for maker in made.values()) > 0
    if "unshare" in str(builders[0].args):
        assert {maker["host"] for maker in made.values()} == {"north", "south"}
    check(store, pipeline_folder, "0:80")


def check(store: Path, teacher: Path, seeds: str) -> None:
    """The bytes of a single build, and nothing wrong anywhere."""
    build(plan_for(teacher, store.with_name("whole.zarr"), steps=STEPS, seeds=seeds))
    assert tree(store) == tree(store.with_name("whole.zarr"))
    assert verify(TrajectoryCache.open(store)).findings == ()
    assert not list(store.parent.glob("*.partial"))


def test_a_vanished_owners_block_is_taken_over(tmp_path: Path, pipeline_folder: Path) -> None:
    """One builder stands still in the middle of a block; others make the rest and wait for it until it dies."""
    store, seeds = tmp_path / "toy.zarr", "0:16"
    owner = start(tmp_path, *command(pipeline_folder, seeds))
    wait_until(lambda: committed(store), owner)
    held: list[int] = []
    wait_until(lambda: held.extend(stand_still(owner, store)) or held, owner)
    (block,) = held
    before = committed(store)
    other = start(tmp_path, *command(pipeline_folder, seeds))
    with ThreadPoolExecutor() as executor:
        only = plan_for(pipeline_folder, store, steps=STEPS, seeds=f"{4 * block}:{4 * block + 4}")
        idle = Listener()
        waiting = executor.submit(build, only, reporter=idle)  # has nothing to do but wait
        assert line_of(other).endswith("waiting for 1 blocks that another build is making\n")
        assert committed(store) == [made for made in range(4) if made != block]
        wait_until(lambda: "waiting for 1 blocks that another build is making" in idle.heard, other)
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
        assert num_built(finish(other)[0]) + waiting.result().num_blocks == 4 - len(before)
    assert makers(store)[block]["pid"] in (other.pid, os.getpid())
    check(store, pipeline_folder, seeds)


def stand_still(builder: Process, store: Path) -> list[int]:
    """Stop a process while it holds a block; let it go on if it holds none just now."""
    builder.send_signal(signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(builder.pid, os.WUNTRACED)[1])
    for block in range(4):
        with StoreLocks(store).block(block) as free:
            if not free and block not in committed(store):
                return [block]
    builder.send_signal(signal.SIGCONT)
    return []


def line_of(builder: Process) -> str:
    """What a builder says until it says that it waits."""
    assert builder.stderr is not None
    said = ""
    while "waiting" not in said:
        line = builder.stderr.readline()
        assert line, said
        said += line
    return said


def test_a_store_too_large_to_sweep_is_swept_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builders that begin together don't wait for one that walks a million files."""
    store = tmp_path / "toy.zarr"
    writer = write_store(store, "0:64")
    before = tree(store)
    (store / "blocks/000002.json").unlink()
    left = store / "states/0002/c/2/0/0/0.0123456789ab.partial"
    left.write_bytes(b"half")
    monkeypatch.setattr("advkd.cache.write.folder.SWEEP_SECONDS", 0.0)
    with writer.writing():
        assert left.exists()
        writer.commit(2, block_states(writer.layout, 2))
    assert tree(store) == before


@pytest.mark.slow
def test_many_builders_that_come_and_go(tmp_path: Path, pipeline_folder: Path) -> None:
    """Six at once, three of them killed in the middle; the rest end with the bytes of one build."""
    store = tmp_path / "toy.zarr"
    builders = [start(tmp_path, *command(pipeline_folder, "0:160")) for _ in range(6)]
    for number, doomed in enumerate(builders[:3], start=1):
        wait_until(lambda number=number: len(committed(store)) >= 6 * number, builders[-1])
        doomed.kill()
        doomed.communicate()
    said = sum(num_built(finish(builder)[0]) for builder in builders[3:])
    assert said == sum(maker["pid"] in {builder.pid for builder in builders[3:]} for maker in makers(store).values())
    check(store, pipeline_folder, "0:160")
