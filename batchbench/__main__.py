"""The entry point of ``batchbench`` and ``python -m batchbench``."""

import sys


def main() -> None:
    """Run the program; print one line on Ctrl-C, also during its imports."""
    try:
        from batchbench.cli.main import main as program

        program()
    except KeyboardInterrupt:
        sys.stderr.write("batchbench: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
