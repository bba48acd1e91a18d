"""Faults, counted: kills, power cuts, damage, full disks, and files that are nearly right.

    python -m benchmarks.faults OUT [--minutes M] [-k EXPRESSION]

Runs the tests that count what they try (`python -m pytest -m counted`), two at a time, then each reader of tests/fuzz
for M minutes. OUT gets faults.xml and fuzz.json; the table of docs/reliability.md is printed at the end. Ends with 1 if
anything did not hold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from milan_pipe.planning.tables import duration

TESTS = Path(__file__).parents[1] / "tests"

Row = tuple[str, str, str]


def counted(path: Path) -> Iterator[Row]:
    """Rows of a `--junitxml` file: what was done, how often, what held; a test that failed is a row too."""
    # pytest wrote it a moment ago.
    for case in ElementTree.parse(path).iter("testcase"):  # noqa: S314
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            yield f"`{name}`", "", "**failed**"
        elif (skipped := case.find("skipped")) is not None:
            yield f"`{name}`", "0", f"skipped: {skipped.get('message')}"
        for one in case.iter("property"):
            fault, times, held = one.get("value", "").split("|")
            yield fault, times, held


def fuzzed(path: Path) -> Row:
    """All readers in one row."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    cases, refused = (sum(row[name] for row in rows) for name in ("cases", "refused"))
    failures = sum(len(row["failures"]) for row in rows)
    hours = duration(sum(row["seconds"] for row in rows) / 3600)
    what = f"files that are nearly right: {len(rows)} readers, {hours} in all, seed {rows[0]['seed']}"
    return what, f"{cases:,}", f"{refused:,} refused, the others read; {failures} broke a promise"


def main() -> None:
    """Do both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=1.0, help="of fuzzing, for each reader; 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzing")
    parser.add_argument("-k", dest="expression", help="those tests alone, as of pytest")
    given = parser.parse_args()
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    words = ["-m", "counted", "-n", "2", "--dist", "load", f"--junitxml={out / 'faults.xml'}", str(TESTS)]
    chosen = ["-k", given.expression] if given.expression else []
    ends = [subprocess.run([sys.executable, "-m", "pytest", *words, *chosen], cwd=TESTS.parent, check=False).returncode]
    rows = list(counted(out / "faults.xml"))
    if given.minutes:
        fuzz = ["--minutes", str(given.minutes), "--seed", str(given.seed), "--out", str(out / "fuzz.json")]
        ends.append(subprocess.run([sys.executable, "-m", "fuzz", *fuzz], cwd=TESTS, check=False).returncode)
        rows.append(fuzzed(out / "fuzz.json"))
    print(f"\n{time.strftime('%Y-%m-%d')}, in {duration((time.monotonic() - began) / 3600)}:\n")
    print("| what was done | times | what held |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.exit(any(ends))


if __name__ == "__main__":
    main()
