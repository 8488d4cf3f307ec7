"""``python -m batchbench``."""

from batchbench.cli.main import main

if __name__ == "__main__":
    main()
