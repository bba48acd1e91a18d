"""The readers for as long as you like, or a number of cases: `cd tests && python -m fuzz [READER ...] [--minutes M]`.

With `--case N` one case is done again, and its traceback shown.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from fuzz.harness import run_reader
from fuzz.readers import READERS

MINUTES_OF_A_DAY = 24 * 60


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"default: all of {', '.join(READERS)}")
    parser.add_argument("--minutes", type=float, help="for each reader; default: 1, or as many as --cases takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="do this one alone, and show its traceback")
    parser.add_argument("--cases", type=int, help="at most so many of each reader")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    given = parser.parse_args()
    if unknown := set(given.readers) - READERS.keys():
        parser.error(f"no such reader: {', '.join(sorted(unknown))}")
    first, cases = (given.first, given.cases) if given.case is None else (given.case, 1)
    minutes = given.minutes or (1 if cases is None else MINUTES_OF_A_DAY)
    rows = []
    print(f"{'reader':<26}{'cases':>9}{'refused':>9}{'seconds':>9}{'failures':>10}", flush=True)
    # In memory: each case writes a file or two.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as scratch:
        for name in given.readers or READERS:
            root = Path(scratch)
            found = run_reader(
                READERS[name],
                root,
                seed=given.seed,
                first=first,
                cases=sys.maxsize if cases is None else cases,
                seconds=60 * minutes,
            )
            kinds = {(failure.where, failure.what[:40]): failure for failure in reversed(found.failures)}
            row = f"{name:<26}{found.cases:>9}{found.refused:>9}{found.seconds:>9.1f}{len(found.failures):>10}"
            print(row, flush=True)
            for failure in kinds.values():
                print(f"  {failure}", flush=True)
                if given.case is not None:
                    print(failure.trace)
            rows.append({"reader": name, "seed": given.seed, **asdict(found)})
    if given.out is not None:
        given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(row["failures"] for row in rows))


if __name__ == "__main__":
    main()
