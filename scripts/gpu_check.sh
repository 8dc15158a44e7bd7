#!/usr/bin/env bash
# GPU tests and one speed line, from a source checkout, with no network: scripts/gpu_check.sh OUT
# Needs torch >= 2.11 and transformers >= 5.17 in the current Python; what else is missing is reported, not installed.
# Writes OUT/gpu-<device>.json and OUT/gpu-<device>.log; the exit code is that of the tests.
set -u
out=${1:?usage: scripts/gpu_check.sh OUT}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$root/src:$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cd "$root" || exit 1
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "none")') || exit 1
if [ "$device" = none ]; then
    echo "gpu_check: torch finds no CUDA device here"
    exit 1
fi
log="$out/gpu-$device.log"
{
    if "$python" -c 'import pytest, hypothesis' 2>/dev/null; then
        "$python" -m pytest -m gpu tests/gpu -q -rA -p no:cacheprovider
        tests=$?
    else
        echo "gpu_check: pytest or hypothesis is missing, so the GPU tests did not run"
        tests=1
    fi
    "$python" -m benchmarks.gpu_speed --output "$out/gpu-$device.json"
    speed=$?
} > "$log" 2>&1
tail -n 40 "$log"
[ "$tests" -eq 0 ] && [ "$speed" -eq 0 ]
