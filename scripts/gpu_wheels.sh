#!/usr/bin/env bash
# Wheels to carry to a GPU machine that has torch and transformers, but no network: scripts/gpu_wheels.sh [FOLDER]
# Fills FOLDER (.gpu-wheels in the checkout, which git ignores) for Python 3.12 on Linux x86-64; PYTHON_VERSION=3.11
# for another. scripts/gpu_check.sh installs them there beside what is there, torch untouched. About 10 MB.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/.gpu-wheels}
version=${PYTHON_VERSION:-3.12}
python=${PYTHON:-python3}
# TRL is the peer; liger-kernel and bitsandbytes are optional parts of tunesmith; the others are what
# tunesmith and datasets need that an image with torch, transformers, peft and accelerate may lack.
packages=(trl liger-kernel bitsandbytes datasets dill multiprocess httpx pydantic pydantic_core
    annotated-types typing-inspection typing_extensions)
pins=(trl==1.16.0 liger-kernel==0.8.5)
pinned() { # what constraints.txt or the list above says of a package
    local found
    found=$(printf '%s\n' "${pins[@]}" | cat - "$root/constraints.txt" | grep -i "^$1==" | head -n 1)
    echo "${found:-$1}"
}
platforms=()
for name in manylinux_2_39 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${name}_x86_64")
done
rm -rf "$folder"
mkdir -p "$folder"
for package in "${packages[@]}"; do
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version "$version" --implementation cp "${platforms[@]}" -d "$folder" "$(pinned "$package")"
done
# bitsandbytes brings kernels for every CUDA since 11.8 and for ROCm: 43 MB, of which CUDA 13's are 1.5
"$python" - "$folder" "${CUDA:-130}" <<'PYTHON'
import sys, zipfile
from pathlib import Path

folder, cuda = Path(sys.argv[1]), sys.argv[2]
for wheel in folder.glob("bitsandbytes-*.whl"):
    fresh = wheel.with_suffix(".new")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED) as new:
        drop = {name for name in old.namelist() if "/libbitsandbytes_" in name}
        drop -= {f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in (f"cuda{cuda}", "cpu")}
        for name in sorted(set(old.namelist()) - drop):
            data = old.read(name)
            if name.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(line for line in lines if line.split(",")[0] not in drop).encode()
            new.writestr(old.getinfo(name), data, zipfile.ZIP_DEFLATED)
    fresh.replace(wheel)
PYTHON
du -sh "$folder"
ls "$folder"
