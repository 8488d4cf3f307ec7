"""Install the stand-in for CUDA in a child process of one that has it."""

import os

if os.environ.get("BATCHBENCH_CUDA_STAND_IN"):
    from support.cuda_stand_in import install_for_good

    install_for_good()
