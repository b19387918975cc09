"""docs/sharing.md as a team plays it: every command on the page runs as it is written, on clones with a real remote."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from advkd.cache import TrajectoryCache
from advkd.pipeline.cli.cache import main as cache_command
from advkd.pipeline.cli.train import main as train_command
from tests.conftest import Invoke
from tests.pipeline.clones import ENVIRONMENT, edit_config, refused, repro, run
from tests.pipeline.processes import wait_until
from tests.pipeline.readme import commands_below, readme_commands, shell_blocks
from tests.pipeline.team import PAGE, Team, added, founded, is_free, pulled, whole_tree
from tests.stores import tree

STORE, TEACHER = "cache/smoke.zarr", "teachers/smoke"
BUILD = ("build", "--config", "configs/smoke.yaml", "--out", STORE)
NUM_STATES = 6
FILES_A_BLOCK = NUM_STATES + 2  # chunks, record, provenance
FILES_AN_EXTENSION = NUM_STATES + 1  # the arrays' zarr.json, DVC's list
SLOW = pytest.mark.slow
TWO_STATES = [f"{STORE}/{part}" for part in ("zarr.json", "blocks", "states/0000", "states/0010")]
PULLS = {
    "nothing": [],
    "only the cache": [STORE],
    "the ledger and two states": TWO_STATES,
    "only the teacher": [TEACHER],
    "the teacher and a part of the states": [TEACHER, *TWO_STATES],
    "the cache and a part of the teacher": [STORE, f"{TEACHER}/pipeline"],
    "the teacher and a part of the ledger": [TEACHER, f"{STORE}/zarr.json", f"{STORE}/blocks/000001.json"],
}


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Team:
    """Ann has built 192 seeds and published them."""
    team = founded(tmp_path_factory.mktemp("team"))
    team.play(team.ann, "Build and publish", 0)
    run(team.ann, "git", "tag", "published")
    run(team.ann, "git", "push", "-q", "origin", "published")
    return team


@pytest.fixture(scope="module")
def extended(team: Team) -> Team:
    """Ben has added a block to what Ann published."""
    team.clone(team.ben, "main")
    team.play(team.ben, "Add seeds", 0)
    edit_config(team.ben, "cache", seeds="0:256")
    mine, before = pulled(team.ben), team.objects
    team.play(team.ben, "Add seeds", 1)
    assert added(before, team.objects) == added(mine, pulled(team.ben))
    return team


def test_what_is_published_is_whole(team: Team) -> None:
    assert run(team.ann, "git", "status", "--porcelain") == ""
    assert TrajectoryCache.open(team.ann / STORE).blocks == (0, 1, 2)
    names = {path.name for path in (team.ann / STORE / "provenance").iterdir()}
    assert {"writer.lock", "writer.json"} <= names
    (team.ann / STORE / "blocks/000003.json.0123456789ab.partial").touch()
    assert "up to date" in run(team.ann, "dvc", "status", "cache")
    (team.ann / STORE / "blocks/000003.json.0123456789ab.partial").unlink()
    lock = yaml.safe_load((team.ann / "dvc.lock").read_text())["stages"]
    assert lock["cache"]["outs"][0]["nfiles"] == len(whole_tree(team.ann / STORE))


def test_training_needs_the_cache_alone(team: Team, tmp_path: Path) -> None:
    team.play(tmp_path, "Train from the cache alone", 0)
    ben = tmp_path / "advkd"
    before = whole_tree(ben / STORE)
    assert before == whole_tree(team.ann / STORE)
    assert json.loads((ben / "runs/smoke/run.json").read_text())["status"] == "complete"
    assert repro(ben, "--allow-missing", "train") == []
    edit_config(ben, "train", steps=3)
    team.play(ben, "Train from the cache alone", 1)
    assert json.loads((ben / "runs/smoke/run.json").read_text())["identity"]["config"]["steps"] == 3
    assert whole_tree(ben / STORE) == before and not (ben / "teachers").exists()


@pytest.mark.parametrize("what", [*list(PULLS)[:5], *(pytest.param(what, marks=SLOW) for what in list(PULLS)[5:])])
def test_nothing_is_made_again_on_a_clone_that_has(what: str, team: Team, tmp_path: Path) -> None:
    """Neither by all of it nor up to training, and what was pulled stays as it was."""
    clone = team.clone(tmp_path / "advkd")
    if PULLS[what]:
        run(clone, "dvc", "pull", *PULLS[what])
    before = {name: whole_tree(clone / name) for name in ("cache", "teachers")}
    expected = STORE if TEACHER in PULLS[what] else TEACHER
    (shown,) = re.findall(r"```\n(error: .*) …\n```", PAGE)
    for target in ([], ["train"]) if "and a part" not in what else ([],):
        line = refused(clone, "dvc", "repro", *target)
        assert line.startswith(f"error: dvc.lock says that {expected} was made before; ")
        assert f"not here: `dvc pull {expected}` fetches it" in line
        if what == "only the teacher":
            assert line.startswith(shown.replace("digits", "smoke"))
    assert {name: whole_tree(clone / name) for name in ("cache", "teachers")} == before
    assert run(clone, "git", "status", "--porcelain") == ""


def test_pulling_while_reproducing_runs_only_what_changed(team: Team, tmp_path: Path) -> None:
    """Also where a pull that found no student has left empty folders."""
    clone = team.clone(tmp_path / "advkd")
    (clone / "runs/smoke/log").mkdir(parents=True)
    team.play(clone, "What is made once stays made", 0)
    assert whole_tree(clone / STORE) == whole_tree(team.ann / STORE)
    assert (clone / "runs/smoke/student/model.safetensors").is_file()
    assert "Data and pipelines are up to date" in run(clone, "dvc", "status", "train")


def test_a_yes_makes_a_partial_cache_again(team: Team, tmp_path: Path) -> None:
    """Byte for byte, at the first go, although files are missing of what the ledger has."""
    clone = team.clone(tmp_path / "advkd")
    run(clone, "dvc", "pull", TEACHER, *TWO_STATES)
    say_yes(clone)
    assert repro(clone, "cache") == ["cache"]
    assert tree(clone / STORE) == tree(team.ann / STORE)


@pytest.mark.slow
def test_a_yes_makes_everything_again(team: Team, tmp_path: Path) -> None:
    clone = team.clone(tmp_path / "advkd")
    say_yes(clone)
    assert repro(clone, "cache") == ["teacher", "cache"]
    assert tree(clone / STORE) == tree(team.ann / STORE)


def say_yes(clone: Path) -> None:
    (yes,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    path = clone / "configs/smoke.yaml"
    path.write_text(path.read_text().replace("name: smoke\n", yes.replace("digits", "smoke"), 1))


def test_another_request_needs_no_yes(
    team: Team, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed sampler runs on a clone without the cache, which other words for the same one do not."""
    clone = team.clone(tmp_path / "advkd")
    run(clone, "dvc", "pull", TEACHER)
    edit_config(clone, "sampler", spacing="trailing")
    edit_config(clone, "cache", record=[2, 4, 6, 8], batch_size=32)
    monkeypatch.chdir(clone)
    monkeypatch.setenv("DVC_ROOT", str(clone))
    monkeypatch.setenv("DVC_STAGE", "cache")
    assert f"{STORE} was made before" in invoke(cache_command, *BUILD).stderr
    edit_config(clone, "sampler", steps=8)
    assert invoke(cache_command, *BUILD).exit_code == 0
    assert TrajectoryCache.open(clone / STORE).recipe.sampler["steps"] == 8


def test_a_teacher_that_was_changed_by_hand_is_kept(team: Team, tmp_path: Path) -> None:
    """DVC would remove it before it runs the stage."""
    clone = team.clone(tmp_path / "advkd")
    run(clone, "dvc", "pull", TEACHER)
    (clone / TEACHER / "pipeline/notes.txt").write_text("mine")
    before = whole_tree(clone / TEACHER)
    line = refused(clone, "dvc", "repro", "cache")
    assert whole_tree(clone / TEACHER) == before
    ways = re.findall(r"`(dvc [^`]*)`", line)
    assert ways == [f"dvc checkout {TEACHER}", f"dvc commit --force {TEACHER}"]
    run(clone, *shlex.split(ways[1]))
    assert "Data and pipelines are up to date" in run(clone, "dvc", "status", "teacher")


def test_a_partial_cache_is_not_extended(
    team: Team, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside DVC either: the blocks that are not here would be missing from what is shared."""
    clone = team.clone(tmp_path / "advkd")
    monkeypatch.chdir(clone)
    run(clone, "dvc", "pull", TEACHER, *TWO_STATES)
    before = whole_tree(clone / STORE)
    result = invoke(cache_command, *BUILD, "--seeds", "192:256")
    assert result.exit_code == 1 and "3 blocks are in the ledger but not wholly here" in result.stderr
    assert whole_tree(clone / STORE) == before
    shutil.rmtree(clone / TEACHER)
    result = invoke(cache_command, *BUILD, "--seeds", "192:256")
    assert result.exit_code == 2 and f"{TEACHER} was made before; it is not here" in result.stderr
    assert not (clone / TEACHER).exists()


def test_a_store_of_another_recipe_in_place_of_the_recorded_one_is_not_replaced(
    team: Team, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a change of the sampler that was undone."""
    clone = team.clone(tmp_path / "advkd")
    monkeypatch.chdir(clone)
    run(clone, "dvc", "pull", TEACHER)
    assert invoke(cache_command, *BUILD, "--steps", "8").exit_code == 0
    before = whole_tree(clone / STORE)
    monkeypatch.setenv("DVC_ROOT", str(clone))
    monkeypatch.setenv("DVC_STAGE", "cache")
    result = invoke(cache_command, *BUILD, "--on-mismatch", "set-aside")
    assert result.exit_code == 1 and f"move it away, and `dvc checkout {STORE}` brings back" in result.stderr
    assert whole_tree(clone / STORE) == before


def test_only_new_blocks_travel(extended: Team, tmp_path: Path) -> None:
    """Nothing that Ann pushed is pushed again by Ben, or pulled again by who had it."""
    cat = extended.clone(tmp_path / "advkd", "main")
    run(cat, "git", "reset", "-q", "--hard", "published")
    run(cat, "dvc", "pull", "cache")
    before = pulled(cat)
    extended.play(cat, "Add seeds", 2)
    new = added(before, pulled(cat))
    assert len(new) == FILES_A_BLOCK + FILES_AN_EXTENSION
    assert new == pulled(extended.ben).keys() - pulled(extended.ann).keys()
    assert whole_tree(cat / STORE) == whole_tree(extended.ben / STORE)


def test_two_states_are_enough_to_train_from(team: Team, tmp_path: Path, invoke: Invoke) -> None:
    clone = team.clone(tmp_path / "advkd")
    team.play(clone, "Take only some states", 0)
    files = {"zarr.json", *(f"blocks/00000{block}.json" for block in range(3))}
    for state in ("0000", "0010"):
        files |= {f"states/{state}/zarr.json", *(f"states/{state}/c/{block}/0/0/0" for block in range(3))}
    assert set(whole_tree(clone / STORE)) == files
    assert len(pulled(clone)) == len(files) + 1  # DVC's list of the files
    assert sorted(TrajectoryCache.open(clone / STORE).states) == [0, 10]
    run(clone, "dvc", "pull", f"{STORE}/states/zarr.json")
    assert "not here: state 0002, 0004, 0006, 0008" in invoke(cache_command, "verify", clone / STORE).output
    assert json.loads((clone / "runs/smoke/run.json").read_text())["identity"]["config"]["states"] == [0, 10]


def test_two_extensions_become_the_store_that_one_build_makes(
    extended: Team, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    dan = extended.clone(tmp_path / "advkd")
    run(dan, "git", "switch", "-qc", "more")
    run(dan, "dvc", "pull", "teacher", "cache")
    edit_config(dan, "cache", seeds="256:320")
    assert repro(dan, "cache") == ["cache"]
    run(dan, "git", "commit", "-qam", "more")
    run(dan, "dvc", "push", "cache")
    mine = pulled(dan)
    extended.play(dan, "When two people added seeds at once", 0, fail="git merge")
    assert len(added(mine, pulled(dan))) == FILES_A_BLOCK + FILES_AN_EXTENSION
    run(dan, "git", "checkout", "--ours", "configs/smoke.yaml")
    edit_config(dan, "cache", seeds="0:320")
    remote = extended.objects
    extended.play(dan, "When two people added seeds at once", 1)
    assert len(added(remote, extended.objects)) == 1  # DVC's list of the files
    assert run(dan, "git", "status", "--porcelain") == ""
    assert "up to date" in run(dan, "dvc", "status", "cache")
    monkeypatch.chdir(dan)
    assert invoke(cache_command, *BUILD[:-1], "cache/once.zarr").exit_code == 0
    assert tree(dan / STORE) == tree(dan / "cache/once.zarr")


def test_another_repository_gets_or_imports_it(extended: Team, tmp_path: Path) -> None:
    extended.play(tmp_path, "From another repository", 0)
    assert tree(tmp_path / "smoke.zarr") == tree(extended.ben / STORE)
    other = tmp_path / "other"
    other.mkdir()
    run(other, "git", "init", "-q")
    run(other, "dvc", "init", "-q")
    extended.play(other, "From another repository", 1)
    assert tree(other / "smoke.zarr") == tree(extended.ben / STORE)


@pytest.mark.parametrize("kind", ["hardlink", "symlink"])
def test_links_into_dvcs_cache_do_no_harm(
    kind: str, team: Team, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and verifying go through them; adding seeds leaves what they lead to as it was."""
    clone = team.clone(tmp_path / "advkd")
    monkeypatch.chdir(clone)
    run(clone, "dvc", "pull", "teacher", "cache")
    if kind == "hardlink":
        team.play(clone, "Links instead of copies", 0)
    else:
        run(clone, "dvc", "config", "--local", "cache.type", kind)
        run(clone, "dvc", "checkout", "--relink", STORE)
    chunk, held = clone / STORE / "states/0010/c/1/0/0/0", whole_tree(clone / ".dvc/cache/files/md5")
    assert chunk.is_symlink() == (kind == "symlink") and not chunk.stat().st_mode & 0o222
    assert chunk.stat().st_nlink == (2 if kind == "hardlink" else 1)
    assert "all as recorded" in invoke(cache_command, "verify", STORE).output
    assert invoke(train_command, "--cache", STORE, "--config", "configs/smoke.yaml", "--max-steps", 1).exit_code == 0
    assert invoke(cache_command, *BUILD, "--seeds", "192:256").exit_code == 0
    verified = invoke(cache_command, "verify", STORE).output
    assert "4 blocks" in verified and "all as recorded" in verified
    assert whole_tree(clone / ".dvc/cache/files/md5") == held
    if kind == "hardlink":
        assert "built 0 blocks" in run(clone, "dvc", "repro", "cache")
        assert held.items() <= whole_tree(clone / ".dvc/cache/files/md5").items()
        assert chunk.stat().st_nlink == 2


def test_the_builder_that_a_killed_dvc_left_behind_helps_the_next(team: Team, tmp_path: Path) -> None:
    clone = team.clone(tmp_path / "advkd")
    run(clone, "dvc", "pull", "teacher", "cache")
    num_blocks = 24
    edit_config(clone, "cache", seeds=f"0:{num_blocks * 64}")
    store = clone / STORE

    def start(log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            return subprocess.Popen(
                ["dvc", "repro", "cache"], cwd=clone, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
            )

    def num_made() -> int:
        return len(list((store / "blocks").glob("*.json")))

    killed = start(tmp_path / "killed.log")
    wait_until(lambda: num_made() > 4)
    killed.kill()
    killed.wait()
    orphan = json.loads((store / "provenance/writer.json").read_text())["pid"]
    os.kill(orphan, signal.SIGSTOP)  # it keeps the blocks that it is at until the next is done with all others
    others = num_blocks - 2  # one it samples, and one it may still be writing
    try:
        assert num_made() < others
        following = start(tmp_path / "following.log")
        wait_until(lambda: num_made() >= others)
    finally:
        os.kill(orphan, signal.SIGCONT)
    assert following.wait(timeout=60) == 0
    assert "had been killed. Auto removed it" in (tmp_path / "following.log").read_text()
    wait_until(lambda: is_free(store))
    assert "all as recorded" in run(clone, "advkd-cache", "verify", STORE)
    team.play(clone, "Locks and killed runs", 0)
    assert repro(clone, "cache") == []
    assert TrajectoryCache.open(store).blocks == tuple(range(num_blocks))


def test_every_command_of_the_page_is_played() -> None:
    played = set(re.findall(r'\.play\([\w.]+, "([^"]+)", (\d+)', Path(__file__).read_text()))
    blocks = [tuple(commands_below(PAGE, heading)[int(number)]) for heading, number in played]
    assert sorted(blocks) == sorted(map(tuple, shell_blocks(PAGE)))


def test_the_readme_says_the_same_in_short() -> None:
    page = {command for block in shell_blocks(PAGE) for command in block}
    short = [command for block in readme_commands("Sharing a cache") for command in block]
    assert short and set(short) <= page
