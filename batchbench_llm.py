"""The start of the programs ``batchbench`` and ``batchbench-llm``, which are the same.

Another project on PyPI is called ``batchbench``. Its package and its program have the names of
ours, so whichever is installed last overwrites files of the other. This module has a name of its
own, so it can tell.
"""

import sys

REPAIR = "pip uninstall batchbench && pip install --force-reinstall --no-deps batchbench-llm"


def fault() -> str | None:
    """Return why the package ``batchbench`` that Python finds is not ours; None if it is."""
    try:
        import batchbench
    except ImportError:
        return f"the package batchbench is missing; type {REPAIR.partition(' && ')[2]}"
    if getattr(batchbench, "__distribution__", None) == "batchbench-llm":
        return None
    if batchbench.__file__ is None:  # an uninstall of the other project took __init__.py along
        return f"files of batchbench are missing; type {REPAIR.partition(' && ')[2]}"
    from importlib import metadata

    try:
        name = f"the other project batchbench {metadata.version('batchbench')}"
    except metadata.PackageNotFoundError:
        name = "another project"
    return f"{batchbench.__file__} is a file of {name}; type {REPAIR}"


def main() -> None:
    """Run the program, or print one line that says how to repair the installation."""
    if error := fault():
        sys.stderr.write(f"batchbench-llm: {error}\n")
        sys.exit(2)
    from batchbench.__main__ import main as program

    program()


if __name__ == "__main__":
    main()
