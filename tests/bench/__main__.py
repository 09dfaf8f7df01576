"""All benchmarks, one JSON object a line: bench, case, value, unit, goal, met.

python -m tests.bench [ring] [swaps] [cost] [agent]
"""

from __future__ import annotations

import json
import subprocess
import sys

BENCHES = ("ring", "cost", "swaps", "agent")


def main() -> int:
    """Each in a process of its own, as some leave their network namespace. Exit 1 if one could not run."""
    wanted = sys.argv[1:] or BENCHES
    if unknown := set(wanted) - set(BENCHES):
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    failed = 0
    for name in wanted:
        done = subprocess.run([sys.executable, "-B", "-m", f"tests.bench.{name}"], check=False)
        if done.returncode != 0:
            failed = 1
            print(
                json.dumps({"bench": name, "case": "failed", "value": done.returncode, "unit": "exit code"})
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
