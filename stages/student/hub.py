"""A student to use anywhere: from a folder, a run or the Hub, and back.

    student = Student.from_pretrained("runs/digits")     # or a folder, or a Hub id
    images = student(student.noise([0, 1, 2]))           # (3, C, H, W), about [−1, 1]
    student.push_to_hub("me/digits-one-pass")

What it loads executes no code: `config.json` names one of advkd's own architectures, weights are safetensors. Needs
torch, NumPy and safetensors; huggingface_hub only where the Hub is meant.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Self

import numpy.typing as npt
from torch import Tensor, nn

from advkd.cache.errors import TrainingError, UsageError
from advkd.cache.files.durable import write_atomically
from advkd.stages.student.config import StudentConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.sharing.card import model_card
from advkd.stages.student.sharing.origin import FILE as PROVENANCE
from advkd.stages.student.sharing.origin import Provenance, read_provenance, write_provenance
from advkd.stages.student.student import WEIGHTS, is_student, noise_of, read_student, save_student
from advkd.stages.student.training.protocol import StudentNetwork

FILES = ["config.json", WEIGHTS, PROVENANCE]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


class Student(nn.Module):
    """A trained one-pass sampler with what belongs to it.

    Args:
        network: the network itself.
        config: which one it is.
        geometry: item shape, noise levels, how noise is drawn.
        provenance: where it comes from; empty if that is not known.
    """

    def __init__(
        self, network: StudentNetwork, config: StudentConfig, geometry: Geometry, provenance: Provenance | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.geometry = geometry
        self.provenance: Provenance = provenance or {}

    def forward(self, noise: Tensor) -> Tensor:
        """x_T (N, C, H, W), unit normal → x_0 of the same shape, about [−1, 1]."""
        images: Tensor = self.network(noise)
        return images

    def heads(self, noise: Tensor) -> list[Tensor]:
        """One prediction per recorded state after x_T."""
        return self.network.heads(noise)

    def noise(self, seeds: npt.ArrayLike) -> Tensor:
        """x_T of some seeds, the same as the teacher's in the cache: float32, shape (N, C, H, W)."""
        return noise_of(self.geometry, seeds)

    def deployed_parameters(self) -> int:
        """Parameters that a sample needs."""
        return self.network.deployed_parameters()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Load a student, ready to evaluate, on the CPU, in float32.

        Args:
            pretrained_model_name_or_path: a student's folder, a run's folder, or the id of a Hub repository.
            revision: branch, tag or commit, on the Hub.
            cache_dir: of huggingface_hub's downloads.
            token: for a private repository.
            force_download: even if it is here.
            local_files_only: don't ask the Hub.

        Raises:
            TrainingError: it is not there, or not a student that this advkd can load.
        """
        source = Path(pretrained_model_name_or_path)
        if source.is_dir():
            folder = _student_folder(source)
        else:
            folder = _fetch(
                str(pretrained_model_name_or_path),
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        network, config, geometry = read_student(folder)
        return cls(network, config, geometry, read_provenance(folder)).eval()

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool | None = None,
    ) -> None:
        """Write weights, configuration, provenance and a model card; each file whole or not at all.

        Args:
            save_directory: made if it isn't there.
            push_to_hub: publish it too.
            repo_id: where to, and the name on the card; the folder's name if not given.
            token: for the Hub.
            private: on the Hub.

        Raises:
            UsageError: the folder holds something else.
        """
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file: give a folder to save the student in")
        if folder.is_dir() and any(folder.iterdir()) and not is_student(folder):
            raise UsageError(f"{folder} holds something that is no student: give an empty folder, or a new one")
        name = repo_id or folder.absolute().name
        folder.mkdir(parents=True, exist_ok=True)
        save_student(folder, self.network, self.config, self.geometry)
        if self.provenance:
            write_provenance(folder, self.provenance)
        else:
            (folder / PROVENANCE).unlink(missing_ok=True)
        write_atomically(folder / "README.md", [model_card(self, name).encode()])
        if push_to_hub:
            self.push_to_hub(name, token=token, private=private)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "A one-pass student",
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Publish on the Hub, in one commit; the repository is made if it isn't there.

        Args:
            repo_id: such as me/digits-one-pass.
            commit_message: of that commit.
            token: the one that `hf auth login` keeps if not given.
            private: for a new repository.
            revision: the branch to commit to.
            create_pr: propose the commit instead.

        Returns:
            The commit's address.

        Raises:
            TrainingError: the Hub can't be reached or refuses.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        try:
            found = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            with tempfile.TemporaryDirectory() as folder:
                self.save_pretrained(folder, repo_id=found)
                commit = api.upload_folder(
                    repo_id=found,
                    folder_path=folder,
                    commit_message=commit_message,
                    revision=revision,
                    create_pr=create_pr,
                    delete_patterns=[PROVENANCE],  # another student's, if this one has none
                )
        except Exception as error:  # the Hub's client raises its own, its HTTP library's and OS errors
            raise TrainingError(f"the Hub did not take {repo_id} ({_first_line(error)})") from error
        return str(commit.commit_url)


def _student_folder(folder: Path) -> Path:
    """The student's folder of a run's, or the folder itself."""
    inner = folder / "student"
    return inner if (folder / "run.json").is_file() or (inner / "config.json").is_file() else folder


def _fetch(
    source: str,
    *,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    force_download: bool,
    local_files_only: bool,
) -> Path:
    if not _HUB_ID.fullmatch(source):
        raise TrainingError(f"no student in {source}: no such folder, and no id of a Hub repository")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            source,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
            allow_patterns=FILES,
        )
    except Exception as error:  # as above
        raise TrainingError(
            f"no student in {source}: no such folder, and the Hub did not give it ({_first_line(error)})"
        ) from error
    return Path(folder)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
