"""Try inputs and print each that ends badly; the last line counts them.  Exit code 1 where there was one."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--kind", action="append", help="one of kinds.py; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200, help="inputs of each kind")
    parser.add_argument("--begin", type=int, default=0, help="number of the first")
    parser.add_argument("--only", type=int, help="this number alone")
    parser.add_argument("--show", action="store_true", help="print each input and its output")
    parser.add_argument("--code", type=Path, help="try the code of another checkout")
    asked = parser.parse_args()
    if asked.code:
        sys.path.insert(0, str(asked.code.resolve()))
    from tests.fuzz.session import Session

    numbers = [asked.only] if asked.only is not None else range(asked.begin, asked.begin + asked.count)
    bad = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        session = Session(Path(place))
        for kind in asked.kind or session.kinds:
            begun, faults, codes = time.process_time(), Counter[str](), Counter[int]()
            for number in numbers:
                ended, fault = session.judge(kind, asked.seed, number)
                codes[ended.code] += 1
                if asked.show:
                    session.show(kind, asked.seed, number, ended)
                if fault:
                    faults[fault.split(":")[0].split(" at ")[0]] += 1
                    print(f"{kind} {number} (seed {asked.seed}): {fault}", flush=True)
            bad += faults.total()
            print(
                f"== {kind}: {len(numbers)} inputs in {time.process_time() - begun:.0f} s of the processor,"
                f" {faults.total()} end badly {dict(faults)}; exit codes {dict(sorted(codes.items()))}",
                flush=True,
            )
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
