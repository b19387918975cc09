"""A team that shares a cache by DVC, as docs/sharing.md has it play."""

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from advkd.cache.errors import LockedError
from advkd.cache.files.locks import StoreLocks
from tests.conftest import ROOT
from tests.pipeline.clones import ENVIRONMENT, commit, edit_config, new_clone, run
from tests.pipeline.readme import commands_below

PAGE = (ROOT / "docs/sharing.md").read_text()


@dataclass
class Team:
    """A repository that all clone, and a remote that all share."""

    folder: Path

    @property
    def ann(self) -> Path:
        return self.folder / "ann"

    @property
    def ben(self) -> Path:
        return self.folder / "ben"

    @property
    def repository(self) -> Path:
        return self.folder / "advkd.git"

    @property
    def objects(self) -> dict[str, int]:
        """What is in the remote."""
        return objects(self.folder / "remote/files/md5")

    def clone(self, name: Path, rev: str = "published") -> Path:
        """Another's clone, as the repository was at some revision."""
        run(self.folder, "git", "clone", "-q", "--branch", rev, self.repository, name)
        return name

    def play(self, folder: Path, heading: str, block: int, fail: str = "") -> None:
        """Run the commands of a block of the page; one of them may have to fail."""
        for command in commands_below(PAGE, heading)[block]:
            here = command.replace("https://example.org/team/advkd.git", str(self.repository))
            here = here.replace("/mnt/shared/advkd", str(self.folder / "remote"))
            here = here.replace("digits", "smoke").replace("0050", "0010").replace("0,50", "0,10")
            if here.startswith("cd "):
                folder = folder / here.removeprefix("cd ")
            elif fail and command.startswith(fail):
                assert subprocess.run(shlex.split(here), cwd=folder, env=ENVIRONMENT, capture_output=True).returncode
            else:
                run(folder, *shlex.split(here))


def objects(folder: Path) -> dict[str, int]:
    """DVC's objects, and when each was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def pulled(clone: Path) -> dict[str, int]:
    return objects(clone / ".dvc/cache/files/md5")


def added(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """Objects that are new; the others were not written again."""
    assert before.items() <= after.items()
    return after.keys() - before.keys()


def whole_tree(folder: Path) -> dict[str, bytes]:
    """Every file, provenance too, but for what .dvcignore leaves out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("writer.")
    }


def founded(folder: Path) -> Team:
    """Ann has an experiment of 192 seeds, and a repository for all."""
    team = Team(folder)
    new_clone(team.ann)
    edit_config(team.ann, "pretrain", size=8, steps=4, classifier={"epochs": 1})
    edit_config(team.ann, "cache", accept_range=True, seeds="0:192", block_size=64, batch_size=64)
    edit_config(team.ann, "train", steps=2, preview_every=2, checkpoint_every=2)
    commit(team.ann, "quick")
    run(team.folder, "git", "init", "-q", "--bare", "--initial-branch", "main", team.repository)
    run(team.ann, "git", "remote", "add", "origin", team.repository)
    run(team.ann, "git", "push", "-qu", "origin", "main")
    return team


def is_free(store: Path) -> bool:
    try:
        with StoreLocks(store).alone():
            return True
    except LockedError:
        return False
