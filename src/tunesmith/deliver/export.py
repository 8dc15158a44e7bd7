"""A trained model for other programs: a GGUF file, that and a Modelfile for Ollama, or vLLM's command."""

import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM
from transformers import modeling_gguf_pytorch_utils as gguf_reader

from tunesmith.deliver.compare import differences, logits_of, probe_ids
from tunesmith.deliver.gguf_file import check_kind, library, rope, write_gguf
from tunesmith.deliver.modelfile import modelfile
from tunesmith.errors import ConfigError, ModelError
from tunesmith.evaluate.generate import stop_token_ids
from tunesmith.lookup import lookup
from tunesmith.model.chain import ADAPTER_CONFIG, adapter_base, read_json, with_earlier
from tunesmith.runs import write_text

MODELFILE = "Modelfile"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank (`MaxLoRARanks` in its config/lora.py)."""
BEYOND_PLAIN = ("use_dora", "modules_to_save", "trainable_token_indices")
"""Options of an adapter that vLLM does not serve."""
TOLERANCE = {"f32": 1e-4, "f16": 2e-2, "bf16": 1e-1, "q8_0": 1e-1}
"""Largest difference of any logit that rounding may make, as a share of the largest logit."""


def export_gguf(
    model: nn.Module, tokenizer: Any, output: Path, *, kind: str, name: str, overwrite: bool, console: Console
) -> dict[str, Any]:
    """Write `model` as the GGUF file `output`, which appears under its name once it was read back and compared.

    Args:
        model: in float32, without an adapter.
        kind: how matrices are written, one of `TYPES`.
        name: what the model calls itself.
        overwrite: replace `output`.

    Returns: `output`, its `bytes`, `type`, and how far its logits are from the model's, as `merge` does.
    Raises: ConfigError where `output` is in the way; ModelError for what cannot be written exactly.
    """
    check_place(output, overwrite)
    staged = output.with_name(f".{output.name}.staged")  # what a killed export left is written over
    rows = probe_ids(tokenizer, model.get_input_embeddings().weight.shape[0])
    try:
        try:
            write_gguf(model, tokenizer, staged, kind=kind, name=name)
            sync(staged)
        except OSError as error:
            raise ConfigError(f"output: {output} cannot be written: {error.strerror or error}.") from error
        found = differences(logits_of(model, rows), logits_of(read_back(staged, model), rows))
        if not found["relative_difference"] <= TOLERANCE[kind]:  # NaN included
            raise ModelError(
                f"the GGUF file answers differently from the model: logits differ by "
                f"{found['relative_difference']:.1e} of the largest, at most {TOLERANCE[kind]:.0e} in {kind}; "
                "nothing was kept. "
                + ("This is a defect; please report it." if kind == "f32" else "Write it in f16 or f32 (--type).")
            )
        os.replace(staged, output)
    finally:
        staged.unlink(missing_ok=True)
    console.out(
        f"{output}: {output.stat().st_size / 1e6:.0f} MB, {kind}. Read back from disk, logits differ by at most "
        f"{found['relative_difference']:.1e} of the largest (allowed {TOLERANCE[kind]:.0e}); first choice equal at "
        f"{100 * found['same_first_choice']:.1f} % of positions.",
        highlight=False,
    )
    return {"output": str(output), "bytes": output.stat().st_size, "type": kind, **found}


def export_ollama(
    model: nn.Module,
    tokenizer: Any,
    output: Path,
    *,
    kind: str,
    name: str,
    overwrite: bool,
    console: Console,
    system: str | None = None,
) -> dict[str, Any]:
    """A folder with the GGUF file and a Modelfile; otherwise as `export_gguf`."""
    place = output / MODELFILE
    check_place(place, overwrite)
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"  # Ollama's names, and files, hold nothing else
    file = output / f"{plain}.{kind}.gguf"
    found = export_gguf(model, tokenizer, file, kind=kind, name=name, overwrite=overwrite, console=console)
    stops = [tokenizer.decode([token]) for token in stop_token_ids(model, tokenizer)]
    text, said = modelfile(file.name, tokenizer, stops, system)
    write_text(place, text)
    if said:
        console.out(f"{place}: {said}", highlight=False)
    console.out(f"ollama create {plain} -f {shlex.quote(str(place))}", highlight=False)
    return found | {"modelfile": str(place)}


def vllm_command(folder: str) -> str:
    """The command with which vLLM serves the model in `folder`: a whole one, or an adapter beside its base."""
    name = Path(folder).name or folder
    if not (Path(folder) / ADAPTER_CONFIG).is_file():
        return shlex.join(["vllm", "serve", folder, "--served-model-name", name])
    config = read_json(Path(folder) / ADAPTER_CONFIG)
    more = [option for option in BEYOND_PLAIN if config.get(option)]
    more += ["adapters merged before it"] * (len(with_earlier([folder])) > 1)
    ranks = [config.get("r", 0), *(config.get("rank_pattern") or {}).values()]
    limit = next((rank for rank in VLLM_RANKS if rank >= max(ranks)), None)
    if config.get("peft_type") != "LORA" or more or limit is None:
        what = ", ".join(more) or ("a rank over 512" if limit is None else str(config.get("peft_type")))
        raise ModelError(
            f"{folder}: vLLM takes plain LoRA adapters alone, and this one has {what}. Merge it (tunesmith merge "
            f"{folder} OUTPUT), and serve what comes out."
        )
    words = ["vllm", "serve", str(adapter_base(folder)), "--enable-lora", "--lora-modules", f"{name}={folder}"]
    words += ["--max-lora-rank", str(limit)]
    template = Path(folder) / "chat_template.jinja"
    return shlex.join([*words, *(["--chat-template", str(template)] if template.is_file() else [])])


EXPORTS: dict[str, Callable[..., dict[str, Any]]] = {"gguf": export_gguf, "ollama": export_ollama}
"""Name → what writes it."""


def check_asked(output: Path | None, *, to: str, kind: str, overwrite: bool) -> Path:
    """`output`, if it can be written there; raises ConfigError before a model is loaded for nothing."""
    lookup(EXPORTS | {"vllm": vllm_command}, to, "--to")
    library()
    check_kind(kind)
    if output is None:
        raise ConfigError(f"output: name {'the GGUF file' if to == 'gguf' else 'the folder'} that is to be written.")
    check_place(output / MODELFILE if to == "ollama" else output, overwrite)
    return output


def check_place(output: Path, overwrite: bool) -> None:
    """Raise ConfigError where `output` cannot become a file."""
    if output.is_dir():
        raise ConfigError(f"output: {output} is a folder. Name a file, such as {output / 'model.gguf'}.")
    if output.exists() and not overwrite:
        raise ConfigError(f"output: {output} exists. Add --overwrite or choose another name.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {output.parent} cannot be made: {error.strerror or error}.") from error


def sync(path: Path) -> None:
    """On the disk, before it gets its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_back(path: Path, model: nn.Module) -> nn.Module:
    """The model that transformers reads from the file; what it does not read of it, it is told."""
    config = model.config.get_text_config()
    unread = rope(config)["rope_type"] != "default" or getattr(config, "attention_bias", False)
    told = {"config": model.config} if unread or getattr(config, "mlp_bias", False) else {}
    try:
        with no_bar():
            read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **told)
        return read.eval()
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ModelError(f"the GGUF file cannot be read back: {error}. Nothing was kept.") from error


@contextmanager
def no_bar() -> Iterator[None]:
    """Inside, transformers reads GGUF files without a progress bar, which no setting of its own turns off."""
    bar = gguf_reader.tqdm
    gguf_reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        gguf_reader.tqdm = bar
