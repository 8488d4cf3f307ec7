"""The module that ``duet`` and ``check`` start in each installation to run its worker.

The other installation may be another version of batchbench, so this path must not change:
``python -P -m batchbench.studies.worker``.
"""

from batchbench.studies.gate.worker import main

if __name__ == "__main__":
    main()
