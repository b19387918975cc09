"""Documents as tests see them: their shell blocks, by heading."""

import re

from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def shell_blocks(text: str) -> list[list[str]]:
    """Each shell block, as commands without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return [[line.split("  #")[0].strip() for line in block.splitlines() if line.strip()] for block in blocks]


def python_blocks(text: str) -> list[str]:
    """Each Python block as it stands."""
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def commands_below(text: str, heading: str) -> list[list[str]]:
    """The shell blocks below a heading."""
    return shell_blocks(below(text, heading))


def below(text: str, heading: str) -> str:
    """What stands below a heading."""
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def readme_commands(heading: str) -> list[list[str]]:
    """The README's shell blocks below a heading."""
    return commands_below(TEXT, heading)
