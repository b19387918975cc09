"""`python -m benchmarks [PROGRAM…]`: each program in a process of its own, then the tables."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from benchmarks.table import PROGRAMS, read_results, summary, table

MARKS = ("<!-- performance: written by `make bench` -->\n", "<!-- end of performance -->\n")


def write_table(folder: Path) -> None:
    """Write `table.md` next to the results."""
    (folder / "table.md").write_text(table(read_results(folder)), encoding="utf-8")


def readme_part(text: str) -> str:
    """The part of the README between the marks."""
    return text.split(MARKS[0])[1].split(MARKS[1])[0]


def write_readme(readme: Path, folder: Path) -> None:
    """Replace that part by a summary of the results."""
    text = readme.read_text(encoding="utf-8")
    old = MARKS[0] + readme_part(text) + MARKS[1]
    readme.write_text(text.replace(old, MARKS[0] + summary(read_results(folder)) + MARKS[1]), encoding="utf-8")


def main() -> None:
    """Run programs, then write the table and the README's part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"{', '.join(PROGRAMS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--table-only", action="store_true", help="run nothing; write the tables from existing results")
    options = parser.parse_args()
    unknown = [name for name in options.programs if name not in PROGRAMS]
    if unknown:
        parser.error(f"unknown program: {', '.join(unknown)}; expected {', '.join(PROGRAMS)}")
    failed = []
    for name in () if options.table_only else options.programs or PROGRAMS:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--device", options.device, "--out", str(options.out)]
        begin = time.perf_counter()
        if subprocess.run([*command, *(["--quick"] if options.quick else [])], cwd=ROOT).returncode:
            failed.append(name)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    write_table(options.out)
    if options.out == RESULTS:
        write_readme(ROOT / "README.md", options.out)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
