"""Documents as tests see them: their shell blocks, by heading."""

import re

from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def shell_blocks(text: str) -> list[list[str]]:
    """Each shell block, as commands without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return [[line.split("  #")[0].strip() for line in block.splitlines() if line.strip()] for block in blocks]


def commands_below(text: str, heading: str) -> list[list[str]]:
    """The shell blocks below a heading."""
    return shell_blocks(text.split(f"## {heading}\n")[1].split("\n## ")[0])


def readme_commands(heading: str) -> list[list[str]]:
    """The README's shell blocks below a heading."""
    return commands_below(TEXT, heading)
