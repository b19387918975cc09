"""A small cache to build, another teacher for it, and a reporter that listens."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advkd.stages.reporter import SilentReporter
from advkd.stages.teacher.build.plan import Plan, make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig

SETTINGS = ("--block-size", "4", "--batch-size", "4", "--record", "2")


def plan_for(folder: Path, store: Path, *, steps: int = 6, seeds: str = "0:40", **changes: Any) -> Plan:
    config = CacheConfig(seeds=seeds, record=2, block_size=4, batch_size=4, device="cpu", **changes)
    return make_plan(TeacherConfig(source=str(folder)), SamplerConfig(steps=steps), config, store)


def with_other_weights(pipeline_folder: Path, folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    from safetensors.torch import load_file, save_file

    if not folder.exists():
        shutil.copytree(pipeline_folder, folder)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)
    return folder


class Listener(SilentReporter):
    """Hears one bar's life."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.done = self.most = 0

    def start(self, description: str, total: int, unit: str, done: int = 0) -> None:
        self.heard.append(f"start {description} {done} of {total}")

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        self.most = max(self.most, self.done)

    def say(self, text: str) -> None:
        self.heard.append(text)

    def finish(self) -> None:
        self.heard.append("finish")
