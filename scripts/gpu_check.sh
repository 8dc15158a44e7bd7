#!/usr/bin/env bash
# GPU tests and the GPU table, from a source checkout, with no network:
#     scripts/gpu_check.sh OUT [--minutes 9] [--rows WORD ...] [--no-tests] [--fresh] [--dry-run]
# Needs torch >= 2.11 and transformers >= 5.17 in the current Python (PYTHON); what else is missing comes from the
# wheels in .gpu-wheels (WHEELS), which scripts/gpu_wheels.sh fills where there is a network.
# Writes OUT/gpu-<device>.json after every row, OUT/gpu-<device>.log, profiles as text, the tests as JUnit XML. Rows
# that benchmarks/results/gpu-<device>.json has already are not run again, unless --fresh: so copy OUT's file there
# between two runs. --rows takes words of names of rows. --dry-run: tiny shapes on the CPU, where tests skip
# themselves unless TUNESMITH_GPU_DRY_RUN=1.
# The exit code is that of the tests. On a lent machine: carry .gpu-wheels, and give the command a minute more than
# --minutes.
set -u
out=${1:?usage: scripts/gpu_check.sh OUT [--minutes 9] [--rows WORD ...] [--no-tests] [--fresh] [--dry-run]}
shift
minutes=9 tests=yes fresh=no dry=no rows=()
while [ $# -gt 0 ]; do
    case $1 in
    --minutes) minutes=$2 && shift ;;
    --rows) while [ $# -gt 1 ] && [ "${2#--}" = "$2" ]; do rows+=("$2") && shift; done ;;
    --no-tests) tests=no ;;
    --fresh) fresh=yes ;;
    --dry-run) dry=yes ;;
    *) echo "gpu_check: unknown argument $1" && exit 2 ;;
    esac
    shift
done
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$root" || exit 1

# ---- what is carried --------------------------------------------------------------------------------------------
wheels=${WHEELS:-$root/.gpu-wheels}
site=
if compgen -G "$wheels/*.whl" > /dev/null; then
    site=$(mktemp -d)/site
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" "$wheels"/*.whl || exit 1
fi
export PYTHONPATH="$root/src:$root${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TUNESMITH_CACHE=off PYTHONUNBUFFERED=1 TORCHINDUCTOR_FX_GRAPH_CACHE=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/tunesmith-inductor}

# ---- the device -------------------------------------------------------------------------------------------------
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "none")') || exit 1
shape=()
if [ $dry = yes ]; then
    device=dry-run shape=(--device cpu --shape tiny)
elif [ "$device" = none ]; then
    echo "gpu_check: torch finds no CUDA device here (--dry-run tries the script on the CPU)"
    exit 1
fi
result=$out/gpu-$device.json log=$out/gpu-$device.log
known=benchmarks/results/gpu-$device.json
if [ $fresh = no ] && [ ! -f "$result" ] && [ -f "$known" ]; then cp "$known" "$result"; fi
left() { "$python" -c "print(max(0.1, $minutes - $SECONDS / 60))"; }

# ---- tests, then rows -------------------------------------------------------------------------------------------
code=0 junit=()
{
    "$python" -m pip list --disable-pip-version-check 2> /dev/null |
        grep -iE '^(torch|triton|transformers|trl|peft|accelerate|datasets|liger|bitsandbytes|flash|pytest|hypothesis)'
    command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv
    command -v gcc cc || echo "no C compiler: Triton and torch.compile cannot build their launchers"
} > "$log" 2>&1
if [ $tests = yes ]; then
    junit=(--tests "$out/gpu-tests.xml")
    seconds=$("$python" -c "print(int(min(240, 22 * $minutes)))")
    timeout -s INT -k 15 "$seconds" "$python" -m pytest -m gpu tests/gpu -rA -p no:cacheprovider --durations=10 \
        --junitxml="$out/gpu-tests.xml" >> "$log" 2>&1
    code=$?
    grep -E '^(FAILED|ERROR|SKIPPED)|passed|failed|no tests ran' "$log" | cut -c1-300 | tail -n 40
fi
"$python" -m benchmarks.gpu --output "$result" --minutes "$(left)" "${shape[@]}" "${junit[@]}" \
    ${rows[0]+--rows "${rows[@]}"} >> "$log" 2>&1
tail -n 60 "$log"
exit "$code"
