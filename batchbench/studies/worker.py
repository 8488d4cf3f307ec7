"""The name under which ``duet`` and ``check`` start the worker of an installation.

The two sides of a duet may be different versions of batchbench, so this path must not change:
``python -P -m batchbench.studies.worker``.
"""

from batchbench.studies.gate.worker import main

if __name__ == "__main__":
    main()
