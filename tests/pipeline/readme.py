"""The README as tests see it: its shell blocks, by heading."""

import re

from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def readme_commands(heading: str) -> list[list[str]]:
    """Each shell block below a heading, as commands without their comments."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    return [[line.split("  #")[0].strip() for line in block.splitlines() if line.strip()] for block in blocks]
