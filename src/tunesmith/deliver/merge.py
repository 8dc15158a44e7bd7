"""Base + adapter → one checkpoint that needs no peft, believed only after it was read back from disk and compared."""

import copy
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.deliver.compare import differences, logits_of, probe_ids
from tunesmith.errors import ConfigError, ModelError
from tunesmith.evaluate.generate import stop_token_ids
from tunesmith.model.chain import ADAPTER_CONFIG, adapter_base, merge_folders, merged, put_on, with_earlier
from tunesmith.model.load import load_model, load_tokenizer, options_with_positions
from tunesmith.model.quantize import is_quantized
from tunesmith.model.value_head import has_head, read_head, save_head

# Largest difference of any logit, as a share of the largest logit. In half precision this bounds what rounding the
# weights (to 1 in 2^11 and 2^8) may do; that nothing else happened is checked apart, see `merge`.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def merge(
    adapter_dir: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: str = "10GB",
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write base + adapter as one model in safetensors, with tokenizer and chat template.

    The sum is formed in float32 and its logits are compared with those of base and adapter. What was written is read
    back; every weight must be there bit for bit, and the logits are compared again, which in half precision shows
    what the rounding costs. Only then does `output_dir` appear under its name.

    Args:
        adapter_dir: folder with `adapter_config.json` and the adapter's weights; several are merged in their order.
            Those that an adapter was trained on top of come before it without being named.
        output_dir: the merged model. It must be empty or missing unless `overwrite`.
        base: base model, where it is not (any more) where the adapter's config says.
        dtype: type of the written weights: float32, bfloat16, float16. None: the type that the base is stored in.
        max_shard_size: largest file of weights, as `10GB` or `500MB`.
        overwrite: replace the model that `output_dir` holds; a folder that is not a model is never deleted.
        console: where the result is told. None: standard output.

    Returns: output_dir, base, dtype, `max_difference` of the logits, their `scale`, `relative_difference`,
        `tolerance`, and `same_first_choice`, the share of positions where both models prefer the same token.
    Raises: ModelError where base or adapter cannot be loaded, or the merged model answers differently; ConfigError
        where `output_dir` is in the way.
    """
    output_dir = Path(output_dir)
    folders = [adapter_dir] if isinstance(adapter_dir, (str, Path)) else list(adapter_dir)
    if not folders:
        raise ConfigError("merge: no adapter is named. Name a run directory or an adapter's folder.")
    folders = with_earlier([str(folder) for folder in folders])
    base = str(base or _base_of(folders))
    _refuse_to_replace(output_dir, folders, base, overwrite)
    _check_size(max_shard_size)
    model, stored = _load(folders, base)
    target = _target_dtype(dtype, stored)
    tokenizer = _load_tokenizer(folders[-1], base)
    probes = probe_ids(tokenizer, model.get_input_embeddings().weight.shape[0])
    expected = logits_of(model, probes)
    whole = merged(model)
    _compare(expected, logits_of(whole, probes), torch.float32)
    remove_abandoned(output_dir)
    staged = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.staged")
    try:
        _save(whole, tokenizer, staged, target, max_shard_size)
        if has_head(folders[-1]):  # of a reward model
            save_head(read_head(folders[-1]).state_dict(), staged)
        written = _read_back(staged, whole)
        del model, whole  # two copies in memory at most
        result = _compare(expected, logits_of(written.float(), probes), target)
        _move_into_place(staged, output_dir)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    result = {"output_dir": str(output_dir), "base": base, "dtype": _name(target), **result}
    _tell(result, console or Console())
    return result


# ---------------------------------------------------------------------------------------------------- reading


def _base_of(folders: Sequence[str]) -> str:
    for folder in folders:
        if not (Path(folder) / ADAPTER_CONFIG).is_file():
            hint = " It is a whole model already." if (Path(folder) / "config.json").exists() else ""
            raise ModelError(f"{folder} is not an adapter: there is no {ADAPTER_CONFIG} in it.{hint}")
    return adapter_base(folders[-1])


def _load(folders: Sequence[str], base: str) -> tuple[nn.Module, torch.dtype]:
    """Base and adapters in float32, the last one apart, and the type that the base is stored in."""
    *earlier, last = folders
    try:
        model = load_model(base, **options_with_positions(base, last, {}))
    except ModelError as error:
        raise ModelError(
            f"the adapter {last} belongs to '{base}', which cannot be loaded: {_first_line(error)} "
            "Name the base model with --base."
        ) from error
    if is_quantized(model):
        raise ModelError(
            f"the base '{base}' is stored in 4 or 8 bits, which cannot hold a merged adapter exactly. Name the model "
            "that it was quantized from with --base."
        )
    stored = model.dtype
    return put_on(merge_folders(model.float(), earlier), last).float().eval(), stored


def _load_tokenizer(adapter_dir: str, base: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the adapter (its chat template is the trained one), else the base's."""
    source = adapter_dir if (Path(adapter_dir) / "tokenizer_config.json").exists() else base
    return load_tokenizer(source)


def _target_dtype(dtype: str | None, stored: torch.dtype) -> torch.dtype:
    if dtype in (None, "auto"):
        return stored if stored in TOLERANCE else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got '{dtype}'.")
    return DTYPES[dtype]


def _read_back(path: Path, whole: PreTrainedModel) -> PreTrainedModel:
    """The written model; raises ModelError unless it has the weights of `whole`, bit for bit."""
    written = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    expected, found = whole.state_dict(), written.state_dict()
    missing = sorted(set(expected) ^ set(found))
    wrong = missing or [name for name in expected if not torch.equal(expected[name].cpu(), found[name].cpu())]
    if wrong:
        raise ModelError(
            f"the merged model read back from disk differs in {len(wrong)} of {len(expected)} weights, "
            f"e.g. {wrong[0]}; nothing was kept. This is a defect; please report it with the adapter_config.json."
        )
    return written


# ---------------------------------------------------------------------------------------------------- writing


def _check_size(max_shard_size: str) -> None:
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B", str(max_shard_size).strip(), re.IGNORECASE):
        raise ConfigError(f"max_shard_size: expected a size such as 10GB or 500MB, got '{max_shard_size}'.")


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, dtype: torch.dtype, max_shard_size: str
) -> None:
    shutil.rmtree(path, ignore_errors=True)
    model.to(dtype)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = (
        stop_token_ids(model, tokenizer) or None
    )  # elsewhere nobody knows the template
    try:
        path.mkdir(parents=True)
        model.save_pretrained(path, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(path)
    except OSError as error:
        raise ConfigError(f"the merged model cannot be written to {path}: {error.strerror or error}.") from error


# ---------------------------------------------------------------------------------------------------- comparing


def _compare(expected: torch.Tensor, found: torch.Tensor, dtype: torch.dtype) -> dict[str, float]:
    if expected.shape != found.shape:
        raise ModelError(
            f"the merged model has {found.shape[1]} output tokens, base and adapter have {expected.shape[1]}; "
            "nothing was kept."
        )
    figures = differences(expected, found)
    relative = figures["relative_difference"]
    if not relative <= TOLERANCE[dtype]:  # NaN included
        raise ModelError(
            f"the merged model answers differently from base and adapter: logits differ by "
            f"{figures['max_difference']:.2e} of {figures['scale']:.2e} ({relative:.1e}, at most "
            f"{TOLERANCE[dtype]:.0e} in {_name(dtype)}); nothing was kept. "
            "Merge in float32 (--dtype float32), or keep using the adapter with its base."
        )
    return figures | {"tolerance": TOLERANCE[dtype]}


def _tell(result: dict[str, Any], console: Console) -> None:
    console.out(
        f"merged into {result['output_dir']} ({result['dtype']}). Read back from disk, logits differ from base + "
        f"adapter by at most {result['max_difference']:.1e} of {result['scale']:.3g} "
        f"({result['relative_difference']:.1e}, allowed {result['tolerance']:.0e}); "
        f"first choice equal at {100 * result['same_first_choice']:.1f} % of positions.",
        highlight=False,
    )


# ---------------------------------------------------------------------------------------------------- the folder


def _refuse_to_replace(output_dir: Path, folders: Sequence[str], base: str, overwrite: bool) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"output_dir: {output_dir} is a file. Name a folder.")
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"output_dir: {output_dir} is not empty. Add --overwrite or choose another folder.")
    place = output_dir.resolve()
    for name, other in (*(("adapter", Path(folder)) for folder in folders), ("base model", Path(base))):
        if other.exists() and (place == other.resolve() or place in other.resolve().parents):
            raise ConfigError(
                f"output_dir: {output_dir} holds the {name} that is to be merged. Choose another folder."
            )
    if not (output_dir / "config.json").exists() or place == Path.cwd() or place in Path.cwd().parents:
        raise ConfigError(f"output_dir: {output_dir} is not a model folder, so --overwrite does not delete it.")


def remove_abandoned(output_dir: Path) -> None:
    """Delete what earlier merges into the folder left beside it when they were killed."""
    for path in output_dir.parent.glob(".*.staged") if output_dir.parent.is_dir() else ():
        name, _, process = path.name.removesuffix(".staged").rpartition(".")
        if name == f".{output_dir.name}" and process.isdigit() and not is_alive(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _move_into_place(staged: Path, output_dir: Path) -> None:
    """The old model goes only when the new one stands under its name."""
    old = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.old")
    if output_dir.exists():
        os.replace(output_dir, old)
    os.replace(staged, output_dir)
    shutil.rmtree(old, ignore_errors=True)


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if line.endswith(".") else line + "."


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
