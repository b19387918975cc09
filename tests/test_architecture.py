"""docs/architecture.md: its drawings are those of the real imports, and the places that it names exist.

`python -m tests.test_architecture` draws them anew. The direction of imports is held by import-linter (pyproject.toml).
"""

import re
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/architecture.md"
DRAWINGS = ("advkd", "advkd.cache", "advkd.stages.teacher", "advkd.stages.student")
BLOCK = r"(<!-- rooms of {} -->\n)(.*?)(<!-- end -->\n)"


def rooms(graph: grimp.ImportGraph, within: str) -> set[str]:
    """What stands directly within a package; of `advkd` and the cache the sub-packages alone."""
    if within == "advkd":
        stages = {room for room in graph.find_children("advkd.stages") if graph.find_children(room)}
        return {"advkd.pipeline", "advkd.cache", *stages}
    children = graph.find_children(within)
    return {child for child in children if graph.find_children(child)} if within == "advkd.cache" else children


def arrows(graph: grimp.ImportGraph, within: str) -> set[tuple[str, str]]:
    """Pairs (importer, imported) of rooms, lazy imports included, without those that follow from others."""
    nodes = rooms(graph, within)
    direct = {
        a: {b for b in nodes - {a} if graph.direct_import_exists(importer=a, imported=b, as_packages=True)}
        for a in nodes
    }

    def reached(start: str) -> set[str]:
        return direct[start].union(*(reached(b) for b in direct[start]))

    return {(a, b) for a in nodes for b in direct[a] if not any(b in reached(c) for c in direct[a])}


def drawing(graph: grimp.ImportGraph, within: str) -> str:
    """The rooms within a package as a Mermaid flow chart."""

    def name(room: str) -> str:
        return room.removeprefix(f"{within}.").replace(".", "/")

    lines = sorted(f"    {name(a)} --> {name(b)}" for a, b in arrows(graph, within))
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```", ""])


def drawn(text: str) -> str:
    """The page with all drawings made anew."""
    graph = grimp.build_graph("advkd.cache", "advkd.stages", "advkd.pipeline", cache_dir=None)
    for within in DRAWINGS:
        new = drawing(graph, within)
        text, count = re.subn(BLOCK.format(within), lambda found, new=new: found[1] + new + found[3], text, flags=re.S)  # type: ignore[misc]
        assert count == 1, within
    return text


def test_the_drawings_show_the_imports() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == drawn(text), "run `python -m tests.test_architecture`"


def test_files_and_names_that_the_page_names_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    files = re.findall(r"`((?:cache|stages|pipeline|configs|tests|docs|benchmarks)/[\w./-]*)`", text)
    assert len(files) > 20
    for file in files:
        assert (ROOT / file).exists(), file
    for name, file in re.findall(r"`([A-Z][A-Za-z_]+)` (?:in|of) `([\w/]+\.py)`", text):
        assert re.search(rf"^(class )?{name}\b", (ROOT / file).read_text(encoding="utf-8"), flags=re.M), (name, file)


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
