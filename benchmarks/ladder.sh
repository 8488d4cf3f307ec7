#!/usr/bin/env bash
# The three documented ladders: the classic workload at 8 and at 32 slots, and 256 requests of mixed
# lengths. Takes about an hour on two cores; leave the machine alone meanwhile.
#
#     bash benchmarks/ladder.sh [folder] [further options, such as --rounds 5]
set -euo pipefail
out=${1:-ladders}
batchbench=${BATCHBENCH:-.venv/bin/batchbench}

"$batchbench" ladder --batch-size 8 --queue-size 32 --output "$out/classic-8" "${@:2}"
"$batchbench" ladder --batch-size 32 --queue-size 128 --output "$out/classic-32" "${@:2}"
"$batchbench" ladder --batch-size 32 --queue-size 256 --prompt-tokens 16:256 \
    --output-tokens 8:256 --verify 64 --output "$out/mixed" "${@:2}"
