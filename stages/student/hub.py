"""A trained student to use anywhere: loaded from a folder, a run or the Hub, saved, published.

    student = Student.from_pretrained("runs/digits")     # a run, a student's folder, or a Hub id
    images = student(student.noise([0, 1, 2]))           # (3, C, H, W), about [−1, 1]
    images = student(student.noise([0, 1]), student.labels([0, 1]))   # of a class-conditional one
    images = student(student.noise([0]), student.prompts(prompt_embeds=embeds))   # of one that is told prompts
    student.push_to_hub("me/digits-one-pass")

Loading runs no code from the folder: `config.json` names one of advkd's architectures, weights are safetensors. It
needs torch, NumPy and safetensors only. huggingface_hub's `ModelHubMixin` would break these promises: it has to be
imported with the class, parses `config.json` before any check, keeps an outdated card, and its PyTorch form falls back
to pickle.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy.typing as npt
from torch import Tensor, nn

from advkd.cache.errors import TrainingError, UsageError, first_line
from advkd.cache.files.durable import write_atomically
from advkd.cache.format.space import DECODER_PATH
from advkd.stages.decoder import Decoder, read_decoder_file
from advkd.stages.student.card import model_card
from advkd.stages.student.config import StudentConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.provenance import FILE as PROVENANCE
from advkd.stages.student.provenance import Provenance, read_provenance, write_provenance
from advkd.stages.student.student import (
    WEIGHTS,
    folder_of,
    is_student,
    labels_of,
    noise_of,
    prompts_of,
    read_decoder,
    read_student,
    save_student,
)
from advkd.stages.student.training.protocol import StudentNetwork

FILES = ["config.json", WEIGHTS, PROVENANCE, DECODER_PATH]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


class Student(nn.Module):
    """A trained one-pass sampler with its configuration and provenance.

    Args:
        network: the network.
        config: its configuration.
        geometry: item shape, noise levels and noise rule.
        provenance: teacher, cache, seeds, scores; empty if unknown.
        decoder: the file of the decoder of its latents; None for a student of pixels.
    """

    def __init__(
        self,
        network: StudentNetwork,
        config: StudentConfig,
        geometry: Geometry,
        provenance: Provenance | None = None,
        decoder: bytes | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.geometry = geometry
        self.provenance: Provenance = provenance or {}
        self._decoder_file = decoder

    def forward(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """x_T (N, C, H, W), unit normal → x_0 of the same shape: pixels, about [−1, 1], or latents for `decode`.

        Args:
            noise: x_T.
            condition: class labels, int64, shape (N,), or prompts as `prompts` gives them; None of an unconditional
                student.
        """
        items: Tensor = self.network(noise) if condition is None else self.network(noise, condition)
        return items

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the teacher's network per image, of a student that is one; else 1."""
        return self.network.num_evaluations

    def in_fewer(self, noise: Tensor, condition: Tensor | None, count: int) -> Tensor:
        """x_0 as `forward` gives it, by fewer of several evaluations: cheaper, and further from the teacher's."""
        return self.network.in_fewer(noise, condition, count)

    def heads(self, noise: Tensor, condition: Tensor | None = None) -> list[Tensor]:
        """One prediction per recorded state after x_T."""
        return self.network.heads(noise) if condition is None else self.network.heads(noise, condition)

    def labels(self, seeds: npt.ArrayLike) -> Tensor | None:
        """Class labels of some seeds, the same as the teacher's: int64, shape (N,); None if it is unconditional."""
        return labels_of(self.geometry, seeds)

    def prompts(self, **embeddings: Tensor | Sequence[Tensor]) -> Tensor:
        """Prompts as the student is told them, of what the teacher's `encode_prompt` gives: shape (N, rows, columns).

        Args:
            embeddings: by the names of the pipeline's call, such as `prompt_embeds`, shape (N, …).

        Raises:
            UsageError: the student is told no prompts, or embeddings are missing or don't fit.
        """
        return prompts_of(self.geometry, embeddings)

    def inputs(self, seeds: Sequence[int] | range) -> tuple[Tensor, ...]:
        """What the student takes for some seeds: the noise, and the labels if it has classes.

        Raises:
            UsageError: it is told prompts, which don't follow from seeds.
        """
        if self.geometry.prompts is not None:
            raise UsageError("the student is told prompts, which don't follow from seeds; this is for other students")
        labels = self.labels(list(seeds))
        return (self.noise(seeds),) if labels is None else (self.noise(seeds), labels)

    def decode(self, items: Tensor) -> Tensor:
        """Images of x_0, about [−1, 1], float32, shape (N, *image_shape): decoded latents, or pixels as they are."""
        decoder = self.decoder
        return items.float() if decoder is None else decoder.to(next(self.network.parameters()).device)(items)

    @cached_property
    def decoder(self) -> Decoder | None:
        """The decoder of its latents; None for a student of pixels.

        Raises:
            DamagedError: its weights don't fit its configuration.
        """
        space = self.geometry.space
        if space is None or self._decoder_file is None:
            return None
        return read_decoder_file(space, self._decoder_file, DECODER_PATH)

    def noise(self, seeds: npt.ArrayLike) -> Tensor:
        """x_T of some seeds, the same as the teacher's in the cache: float32, shape (N, C, H, W)."""
        return noise_of(self.geometry, seeds)

    def deployed_parameters(self) -> int:
        """Parameters that a sample needs."""
        return self.network.deployed_parameters()

    def model_card(self, name: str) -> str:
        """The model card that `save_pretrained` writes, for a repository or folder of this name."""
        return model_card(name, self.config.kind, self.deployed_parameters(), self.geometry, self.provenance)

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
        """Load a student on the CPU, in float32 and evaluation mode.

        Args:
            pretrained_model_name_or_path: a student's folder, a run's folder, or the id of a Hub repository.
            revision: branch, tag or commit on the Hub.
            cache_dir: folder of huggingface_hub's downloads.
            token: for a private repository.
            force_download: download even if the files are cached.
            local_files_only: use cached files only.

        Raises:
            TrainingError: there is no student that this advkd can load.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = _fetch(
                str(pretrained_model_name_or_path),
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        folder = folder_of(folder)
        network, config, geometry = read_student(folder)
        return cls(network, config, geometry, read_provenance(folder), read_decoder(folder, geometry)).eval()

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool | None = None,
    ) -> None:
        """Write weights, configuration, provenance and a model card; each file is replaced atomically.

        Args:
            save_directory: created if missing.
            push_to_hub: publish it too, as in diffusers.
            repo_id: the Hub repository, and the name on the card; the folder's name if not given.
            token: for the Hub.
            private: whether a new repository is private.

        Raises:
            UsageError: the folder holds something else.
        """
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file: give a folder")
        if folder.is_dir() and any(folder.iterdir()) and not is_student(folder):
            raise UsageError(f"{folder} holds something other than a student: give an empty or a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        save_student(folder, self.network, self.config, self.geometry, self._decoder_file)
        if self.provenance:
            write_provenance(folder, self.provenance)
        else:
            (folder / PROVENANCE).unlink(missing_ok=True)
        name = repo_id or folder.absolute().name
        write_atomically(folder / "README.md", [self.model_card(name).encode()])
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
        """Publish on the Hub, in one commit; the repository is created if missing.

        Args:
            repo_id: such as me/digits-one-pass.
            commit_message: of that commit.
            token: by default the one that `hf auth login` saved.
            private: whether a new repository is private.
            revision: the branch to commit to.
            create_pr: open a pull request instead of committing.

        Returns:
            The commit's URL.

        Raises:
            TrainingError: the Hub is unreachable or refuses.
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
                    delete_patterns=[PROVENANCE],  # remove an earlier student's if this one has none
                )
        except Exception as error:  # huggingface_hub, its HTTP library and the OS each raise their own
            raise TrainingError(f"the Hub did not accept {repo_id} ({first_line(error, 200)})") from error
        return str(commit.commit_url)


def _fetch(source: str, **options: Any) -> Path:
    if not _HUB_ID.fullmatch(source):
        raise TrainingError(f"no student in {source}: neither a folder nor the id of a Hub repository")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(source, allow_patterns=FILES, **options)
    except Exception as error:  # as above
        raise TrainingError(
            f"no student in {source}: no such folder, and the Hub refused it ({first_line(error, 200)})"
        ) from error
    return Path(folder)
