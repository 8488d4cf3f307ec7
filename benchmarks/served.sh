#!/usr/bin/env bash
# Measure real servers once more: llama.cpp's server, vLLM on the CPU and transformers serve.
#
#   benchmarks/served.sh MODELS [OUTPUT]
#
# MODELS has the checkpoint gpt2-dummy and the file gpt2-dummy.gguf of benchmarks/servers.py and
# benchmarks/gguf_checkpoint.py. The variables BATCHBENCH_LLAMA_SERVER, BATCHBENCH_VLLM_PYTHON and
# BATCHBENCH_TRANSFORMERS name the servers; those that are not set are left out. Takes about twelve
# minutes on two quiet cores; results, probes and tables go to OUTPUT.
set -u -o pipefail
cd "$(dirname "$0")/.."
models=$1
output=${2:-benchmarks/results}
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1

measure() { # name model slots trials options of run…
    local name=$1 model=$2 slots=$3 trials=$4
    shift 4
    local facts url pid folder=$output/served-$name
    facts=$("$python" benchmarks/servers.py start "$name" "$model" --slots "$slots" | tail -1) || return
    url=$("$python" -c 'import json, sys; print(json.loads(sys.argv[1])["url"])' "$facts")
    pid=$("$python" -c 'import json, sys; print(json.loads(sys.argv[1])["pid"])' "$facts")
    mkdir -p "$folder"
    echo "== $name, $slots slots: $(date -u +%H:%M:%S), load $(cut -d' ' -f1 /proc/loadavg)"
    local probe=$folder/probe-$slots.json
    "$python" -m batchbench probe "$url" --json > "$probe" 2> /dev/null
    "$python" -c 'import json, sys; d = json.load(open(sys.argv[1]))
print("probe:", d["verdict"], d["slots"], "or more" if d["slots_is_lower_bound"] else "")' "$probe"
    if [ "$trials" -gt 0 ]; then
        "$python" -m batchbench run --target "$url" --batch-size 8 --trials "$trials" "$@" \
            --output "$folder/run" --overwrite > "$folder/run.txt" 2> /dev/null
        echo "exit code $?"
        cp "$folder/run/result.json" "$folder/result.json" && rm -r "$folder/run"
        sed -n '1,/^$/p' "$folder/run.txt"
        if [ "$name" != transformers ] && [ -n "${BATCHBENCH_VLLM_PYTHON-}" ]; then
            "$python" benchmarks/peers.py "$url" --tokenizer "$models/gpt2-dummy" \
                --turns "${TURNS:-theirs ours}" --output "$folder/peers.json" | tee "$folder/peers.md"
        fi
    fi
    "$python" benchmarks/servers.py stop "$pid"
}

if [ -n "${BATCHBENCH_LLAMA_SERVER-}" ]; then
    measure llama.cpp "$models/gpt2-dummy.gguf" 1 0
    measure llama.cpp "$models/gpt2-dummy.gguf" 8 4
fi
if [ -n "${BATCHBENCH_VLLM_PYTHON-}" ]; then
    measure vllm "$models/gpt2-dummy" 1 0
    measure vllm "$models/gpt2-dummy" 8 3
fi
if [ -n "${BATCHBENCH_TRANSFORMERS-}" ]; then
    measure transformers "$models/gpt2-dummy" 8 1 --queue-size 16 --tokenizer "$models/gpt2-dummy"
fi
"$python" benchmarks/client_limits.py --output "$output/client-limits.json" | tee "$output/client-limits.txt"
