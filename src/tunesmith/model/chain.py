"""Adapter folders, one upon another: what they say of their base, whether they fit it, how they are merged into it."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.base import found_again, note_merged, warn_of_another
from tunesmith.model.lora import borrows, borrows_the_same
from tunesmith.model.quantize import is_quantized, quiet_bitsandbytes

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ARGUMENTS = "finetuning_args.json"
HALVES = (torch.bfloat16, torch.float16)
EMBEDDING_NAMES = {"embed_tokens", "wte", "embed_in", "word_embeddings", "lm_head", "embed_out"}


# ---- what a folder says ------------------------------------------------------------------------------------------


def adapter_base(name: str | Path) -> str | None:
    """Name of the base model that an adapter folder was trained on; `None` if `name` is not an adapter folder.

    A relative name is looked for where it was when the adapter was trained, then from the current folder.
    """
    config = Path(name) / ADAPTER_CONFIG
    if not config.is_file():
        return None
    base = read_json(config).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{config}: base_model_name_or_path is missing, so the adapter's base model is unknown. Add it (tunesmith "
            "merge: or name it with --base)."
        )
    place = arguments_place(name)
    return base if place is None else found_again(base, read_json(place / ARGUMENTS).get("base") or {}, place)


def read_json(path: Path, remedy: str = "Save the adapter again.") -> dict[str, Any]:
    """An object from a file; raises ModelError for a file that is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}. {remedy}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no object but a {type(found).__name__}. {remedy}")
    return found


def remembered(folder: str | Path) -> dict[str, Any]:
    """What tunesmith wrote beside an adapter about its base; nothing for other programs' adapters.

    A run writes it once, so `run/checkpoint-100` finds it in `run`.
    """
    place = arguments_place(folder)
    return {} if place is None else read_json(place / ARGUMENTS)


def arguments_place(folder: str | Path) -> Path | None:
    """The folder with the `finetuning_args.json` of an adapter; `None` for other programs' adapters."""
    folder = Path(folder)
    places = (folder, *([folder.parent] if folder.name.startswith("checkpoint-") else []))
    return next((place for place in places if (place / ARGUMENTS).is_file()), None)


def adapter_folders(value: str | Sequence[str] | None) -> list[str]:
    """`checkpoint_dir` as a list; text is split at commas.

    >>> adapter_folders("runs/a, runs/b")
    ['runs/a', 'runs/b']
    """
    names = value.split(",") if isinstance(value, str) else value or []
    return [str(name).strip() for name in names if str(name).strip()]


def with_earlier(folders: Sequence[str]) -> list[str]:
    """The folders, each after those that had been merged into its base when it was trained.

    Raises: ModelError if such a folder is gone.
    """
    found: list[str] = []
    for folder in folders:
        for earlier in remembered(folder).get("merged_before") or []:
            if not (Path(earlier) / ADAPTER_CONFIG).is_file():
                raise ModelError(
                    f"{folder} was trained on its base with the adapter {earlier} merged into it, and that folder is "
                    f"gone. Put it back, or correct 'merged_before' in {Path(folder) / ARGUMENTS}."
                )
            found += [earlier] if not is_among(earlier, found) else []
        found += [folder] if not is_among(folder, found) else []
    return found


def is_among(folder: str, folders: Sequence[str]) -> bool:
    """Whether one of `folders` is the same place."""
    return any(Path(folder).resolve() == Path(other).resolve() for other in folders)


def check_is_adapter(folder: str, option: str = "checkpoint_dir") -> None:
    """Raise ModelError unless `folder` holds an adapter's config and weights."""
    path = Path(folder)
    if not path.is_dir():
        raise ModelError(f"{option}: there is no folder {folder}. Name the folder of a trained adapter.")
    if not (path / ADAPTER_CONFIG).is_file():
        whole = (path / "config.json").is_file()
        hint = (
            "It is a whole model: name it as model_name_or_path, or set adapter: full or freeze."
            if whole
            else "Name the folder of a trained adapter."
        )
        raise ModelError(f"{option}: {folder} is no adapter, {ADAPTER_CONFIG} is missing. {hint}")
    check_weights(folder)


def check_weights(folder: str | Path) -> None:
    """Raise ModelError for an adapter folder without weights, or with pickled ones only."""
    path = Path(folder)
    if (path / ADAPTER_WEIGHTS).is_file():
        return
    hint = (
        "Its weights are pickled (.bin), which can run code when opened: convert them to safetensors first."
        if (path / "adapter_model.bin").is_file()
        else "Copy it from where the adapter was trained."
    )
    raise ModelError(f"the adapter {folder} has no {ADAPTER_WEIGHTS}. {hint}")


# ---- onto a base -------------------------------------------------------------------------------------------------


def put_on(model: PreTrainedModel, folder: str | Path, *, trainable: bool = False) -> nn.Module:
    """The model with the adapter of `folder` on it, whole and nothing but it.

    Raises: ModelError where names or shapes of the adapter's weights are not those of this base (peft passes over
        weights whose layer is not there).
    """
    from peft import PeftModel

    check_weights(folder)
    grow_for_adapter(model, folder)
    quiet_bitsandbytes()
    config = read_config(folder)
    if borrows(config) and (trainable or not borrows_the_same(config)):
        raise ModelError(
            f"{folder} is a checkpoint of an adapter that began with a part of its base (lora_init). Go on from it "
            "with resume_from_checkpoint, or name the run's own folder, whose adapter fits the untouched base."
        )
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"the adapter {folder} does not fit {base_in_words(model, folder)}: {summary(error)}"
        ) from error
    check_names(wrapped, folder)
    warn_of_another(wrapped, remembered(folder).get("base") or {}, folder)
    return wrapped


def read_config(folder: str | Path) -> Any:
    """The config of an adapter; raises ModelError for one that this peft cannot read."""
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        path = Path(folder) / ADAPTER_CONFIG
        raise ModelError(
            f"{path}: peft cannot read it: {type(error).__name__}: {summary(error)} Install the peft that wrote "
            "it, or save the adapter again."
        ) from error


def check_names(wrapped: nn.Module, folder: str | Path) -> None:
    """Raise ModelError unless the file holds exactly the weights that the adapter on this base has."""
    from peft import get_peft_model_state_dict

    found = tensor_shapes(Path(folder) / ADAPTER_WEIGHTS)
    found = {name for name in found if not EMBEDDING_NAMES.intersection(name.split("."))}
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    expected = {name for name in expected if not EMBEDDING_NAMES.intersection(name.split("."))}
    if found == expected:
        return
    extra, missing = sorted(found - expected), sorted(expected - found)
    what = f"it has {extra[0]}, the base has no such layer" if extra else f"it lacks {missing[0]}"
    raise ModelError(
        f"the adapter {folder} does not fit {base_in_words(wrapped, folder)}: {what} "
        f"({len(extra) + len(missing)} weights in all)."
    )


def base_in_words(model: nn.Module, folder: str | Path) -> str:
    """The base that is here, and the one that the adapter names where that is another."""
    here = getattr(getattr(model, "config", None), "_name_or_path", "") or "the base"
    named = adapter_base(folder)
    return here if named == here else f"{here} (it was trained on {named})"


def summary(error: Exception) -> str:
    """The first lines of another library's message that say what is wrong, as one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]).rstrip(".") + "."


def grow_for_adapter(model: PreTrainedModel, folder: str | Path) -> bool:
    """Give a base the rows of tokens that were added before its adapter was trained; says whether it lacked some.

    Their values are in the adapter. Without the rows peft stops at a size mismatch, or at an index that is not there.
    """
    rows = adapter_rows(Path(folder))
    grows = rows > model.get_input_embeddings().weight.shape[0]
    if grows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return grows


def adapter_rows(folder: Path) -> int:
    """Embedding rows that an adapter needs: those it brings, else those that it trains one by one."""
    indices = read_json(folder / ADAPTER_CONFIG).get("trainable_token_indices") or {}
    lists = indices.values() if isinstance(indices, dict) else [indices]
    rows = max((index + 1 for ids in lists for index in ids), default=0)
    weights = folder / ADAPTER_WEIGHTS
    if weights.is_file():
        for name, shape in tensor_shapes(weights).items():
            if name.endswith(".weight") and EMBEDDING_NAMES.intersection(name.split(".")):
                rows = max(rows, shape[0])
    return rows


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Name → shape of each tensor in a safetensors file; nothing is read but its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Save the adapter again.") from error


# ---- into a base -------------------------------------------------------------------------------------------------


def merge_folders(
    model: PreTrainedModel, folders: Sequence[str], say: Callable[[str], None] | None = None
) -> PreTrainedModel:
    """The model with adapters merged into its weights, one after another; sums are formed in float32, rounded once.

    Raises: ModelError for a quantized base, whose grid cannot hold the sum, and for an adapter that does not fit.
    """
    if folders and is_quantized(model):
        raise ModelError(
            f"{folders[0]} cannot be merged into a 4- or 8-bit base, which cannot hold the sum. Let it go on training "
            "(resume_lora_training: true), or load the base without load_in_4bit, load_in_8bit."
        )
    if not folders:
        return model
    with in_float32(model):
        for folder in folders:
            model = merged(put_on(model, folder))
            note_merged(model, Path(folder) / ADAPTER_WEIGHTS)
            if say is not None:
                say(f"adapter: {folder} is merged into the base")
    return model


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, half-precision weights are held in float32; buffers, such as rotary frequencies, keep their type."""
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    half = next((dtype for dtype in before.values() if dtype in HALVES), None)
    for parameter in model.parameters():
        if parameter.dtype in HALVES:
            parameter.data = parameter.data.float()
    yield
    for name, parameter in model.named_parameters():
        dtype = before.get(name, half)  # a head that was tied is there only now
        if dtype is not None and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def merged(model: nn.Module) -> PreTrainedModel:
    """A `PeftModel` as a plain model that answers as it did.

    Raises: ModelError for adapters that are no sum with the weights (prefixes, for one).
    """
    untie_if_adapted(model)
    try:
        plain = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"this adapter cannot be merged: {summary(error)}") from error
    if hasattr(plain, "peft_config"):
        del plain.peft_config  # older ones of peft leave it, and take the next adapter for a second one
    embeddings, head = plain.get_input_embeddings().weight, plain.get_output_embeddings()
    if head is not None and head.weight.data_ptr() != embeddings.data_ptr():
        # peft before 0.21 leaves the config as it was, and not every loader notices that both weights are there.
        for config in (plain.config, plain.config.get_text_config()):
            config.tie_word_embeddings = False
    return plain


def untie_if_adapted(model: nn.Module) -> None:
    """Give a tied head its own weights if an adapter sits on it or on the embeddings.

    The adapter model adds its update to one of the two; merged into the shared weight it would change both.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    def plain(module: nn.Module) -> nn.Module:
        """The base model's own module under peft's wrappers."""
        if isinstance(module, BaseTunerLayer):
            return module.get_base_layer()
        return module.original_module if isinstance(module, ModulesToSaveWrapper) else module

    inner = model.get_base_model()
    embeddings, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    adapted = any(isinstance(part, (BaseTunerLayer, ModulesToSaveWrapper)) for part in (embeddings, head))
    if head is None or not adapted:
        return
    own = plain(head)
    if own.weight.data_ptr() == plain(embeddings).weight.data_ptr():
        own.weight = nn.Parameter(own.weight.detach().clone(), requires_grad=False)


def is_hub_id(name: str) -> bool:
    """Whether a name could be that of a model on the Hub: owner/name."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def check_base(name: str, base: str) -> None:
    """Raise ConfigError where an adapter's base is an adapter itself, ModelError where its folder is gone."""
    if not Path(base).exists() and not is_hub_id(base):
        raise ModelError(
            f"{name}: its {ADAPTER_CONFIG} names the base model {base}, and there is no such folder. Correct "
            "base_model_name_or_path there, or name the base as model_name_or_path and the adapter in checkpoint_dir."
        )
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{name} names {base} as its base, which is an adapter too. Merge that one first (tunesmith merge), or "
            f"give its base as model_name_or_path and both in checkpoint_dir: [{base}, {name}]."
        )
