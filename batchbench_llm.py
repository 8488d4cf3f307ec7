"""The start of the programs ``batchbench`` and ``batchbench-llm``, which are the same.

Another project on PyPI is called ``batchbench``. Its package and its program have the names of
ours, so whichever is installed last overwrites files of the other. This module has a name of its
own, so it can tell.
"""

import sys
from contextlib import suppress
from importlib.util import find_spec

REPAIR = "pip uninstall batchbench && pip install --force-reinstall --no-deps batchbench-llm"


def fault() -> str | None:
    """Return why the package ``batchbench`` that Python finds is not ours; None if it is."""
    found = find_spec("batchbench")
    if found is None or found.origin is None:  # an uninstall of the other took __init__.py along
        return f"files of batchbench are missing; type {REPAIR.partition(' && ')[2]}"
    with suppress(Exception):  # code of the other project may fail
        import batchbench

        if getattr(batchbench, "__distribution__", None) == "batchbench-llm":
            return None
    from importlib import metadata

    try:
        name = f"the other project batchbench {metadata.version('batchbench')}"
    except metadata.PackageNotFoundError:
        name = "another project"
    return f"{found.origin} is a file of {name}; type {REPAIR}"


def main() -> None:
    """Run the program, or print one line that says how to repair the installation."""
    if error := fault():
        sys.stderr.write(f"batchbench-llm: {error}\n")
        sys.exit(2)
    from batchbench.__main__ import main as program

    program()


if __name__ == "__main__":
    main()
