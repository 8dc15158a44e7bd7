"""Tokenizer and weights from a Hub id or a folder, adapters with their base; safetensors or GGUF, never pickles."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.chain import (
    ADAPTER_CONFIG,
    adapter_base,
    check_base,
    is_hub_id,
    merge_folders,
    put_on,
    read_json,
    remembered,
    with_earlier,
)
from tunesmith.model.chat_format import release_padding_row
from tunesmith.model.quantize import (
    check_bitsandbytes,
    keep_differentiable,
    keep_scales,
    own_device,
    quiet_bitsandbytes,
    with_quantization_config,
)
from tunesmith.model.rope import with_positions
from tunesmith.model.template_trial import too_much


def load_tokenizer(name: str, *, gguf_file: str | None = None, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or adapter folder or Hub id. `data.templates.use_template` gives it another template.

    Args:
        name: folder or Hub id.
        gguf_file: file inside `name` that holds tokenizer and weights.
        hub: `revision`, `trust_remote_code`, `cache_dir`, `token`.

    Raises: ModelError if there is none, or its chat template takes all memory or time there is.
    """
    check_folder(name, gguf_file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file, **hub)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{name}: no tokenizer can be loaded from there ({first_line(error)}). A model folder needs its tokenizer "
            "files (tokenizer.json, tokenizer_config.json) beside config.json: copy them from the base model."
        ) from error
    check_template(name, tokenizer)
    return tokenizer


def check_template(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError for a chat template that would exhaust this machine; a model may bring any."""
    templates = getattr(tokenizer, "chat_template", None) or ()
    for template in templates.values() if isinstance(templates, dict) else [templates] if templates else []:
        if why := too_much(template):
            raise ModelError(
                f"{name}: its chat template is not used: {why}. Do not trust this model folder; its weights may do "
                "with another tokenizer."
            )


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    gguf_file: str | None = None,
    **hub: Any,
) -> PreTrainedModel:
    """A causal language model with its weights, on the CPU, as transformers loads it; quantized ones on their device.

    Args:
        name: folder or Hub id of a full model.
        dtype: type of the weights; "auto" and `None` keep the checkpoint's.
        torch_dtype: older name of `dtype`.
        hub: `revision`, `trust_remote_code`, `cache_dir`, `token`, `config`, `load_in_4bit` or `load_in_8bit` with
            their `bnb_...` options, `quantization_config`, and whatever else `from_pretrained` takes.

    Raises: ModelError if there is no such model, it has pickled weights only, or a package that it needs is missing;
        ConfigError for a type that does not exist, or options that contradict each other.
    """
    dtype = checked_dtype(dtype, torch_dtype)
    check_folder(name, gguf_file)
    if (Path(name) / ADAPTER_CONFIG).is_file() and not (Path(name) / "config.json").is_file():
        raise ModelError(
            f"{name}: is an adapter, which has no weights of a base model. Name its base here "
            f"({adapter_base(name)}), and the adapter in checkpoint_dir."
        )
    if attn_implementation is not None:
        hub["attn_implementation"] = attn_implementation
    if gguf_file is None:
        hub.setdefault("use_safetensors", True)  # a pickled checkpoint can run code when it is opened
    else:
        hub["gguf_file"] = gguf_file
    hub = with_quantization_config(hub)
    quiet_bitsandbytes()
    if hub.get("quantization_config") is not None:
        check_bitsandbytes(hub["quantization_config"])
        hub["device_map"] = hub.get("device_map") or own_device()
    model = opened(name, dtype, hub)
    keep_differentiable(model)
    keep_scales(model)
    release_padding_row(model)
    return without_gguf_marks(model)


def opened(name: str, dtype: str | torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    """`from_pretrained`, its errors with what to do about them."""
    misfits = options.get("ignore_mismatched_sizes", False)
    options = {**options, "ignore_mismatched_sizes": True, "output_loading_info": True}  # `check_whole` names them
    try:
        model, told = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except ImportError as error:
        raise ModelError(
            f"{name}: {first_line(error)}. {how_to_install(str(error), options.get('attn_implementation'))}"
        ) from error
    except TypeError as error:
        raise ConfigError(f"{name}: {first_line(error)}. Check the arguments of from_pretrained.") from error
    except SafetensorError as error:
        raise ModelError(
            f"{name}: its weights are damaged or cut short ({first_line(error)}). Copy or download them again."
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{name}: no model can be loaded from there ({first_line(error)}). Give a folder with config.json and "
            "safetensors weights, or a Hub id that this machine can reach or has in its cache."
        ) from error
    except AssertionError as error:
        raise ModelError(f"{name}: its config.json describes no model ({first_line(error)}). Correct it.") from error
    check_whole(name, told, misfits=misfits)
    return model


def check_whole(name: str, told: dict[str, Any], *, misfits: bool = False) -> None:
    """Raise ModelError for weights that the files lack, or have in other shapes: transformers draws random ones.

    Args:
        told: what `from_pretrained` says of a model's weights; those that it left unread are warned of.
        misfits: other shapes are meant.
    """
    missing, unread = sorted(told.get("missing_keys") or ()), sorted(told.get("unexpected_keys") or ())
    if (others := sorted(told.get("mismatched_keys") or ())) and not misfits:
        tensor, stored, built = others[0]
        raise ModelError(
            f"{name}: {len(others):,} of its weights have other shapes than config.json says, such as {tensor}: "
            f"{list(stored)} in its files, {list(built)} by its config. Copy or download both again."
        )
    left = f"{len(unread):,} weights in its files are no part of the model, such as {unread[0]}" if unread else ""
    if missing:
        raise ModelError(
            f"{name}: {len(missing):,} of the model's weights are not in its files, such as {missing[0]}"
            f"{f'; {left}' if left else ''}. Copy or download it again, or correct config.json where it describes "
            "another model."
        )
    if unread:
        warnings.warn(f"{name}: {left}. They are not used: see that config.json is of this model.", stacklevel=2)


def checked_dtype(dtype: Any, torch_dtype: Any = None) -> str | torch.dtype:
    """`dtype`, or `torch_dtype`, as `from_pretrained` takes it.

    Raises: ConfigError where both are given and differ, or neither "auto" nor a type of torch is meant.
    """
    if dtype is not None and torch_dtype is not None and named_dtype(dtype) != named_dtype(torch_dtype):
        raise ConfigError(f"dtype ({dtype}) and torch_dtype ({torch_dtype}) name one option. Keep dtype.")
    return named_dtype(torch_dtype if dtype is None else dtype)


def named_dtype(dtype: Any, option: str = "dtype") -> str | torch.dtype:
    """A type of torch from itself or its name; "auto" for `None`.

    Raises: ConfigError, which names the option, for anything else.
    """
    if dtype is None or dtype == "auto":
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ConfigError(
            f"{option}: expected 'auto', a torch.dtype or the name of one (float32, bfloat16, float16), got {dtype!r}."
        )
    return found


def how_to_install(said: str, attn_implementation: str | None) -> str:
    """What to do about a package that transformers did not find, from what it said."""
    if "gguf" in said.lower():
        return "GGUF files need: pip install 'tunesmith[gguf]'."
    if "bitsandbytes" in said:
        return "4- and 8-bit models need: pip install 'tunesmith[quant]'."
    if attn_implementation is not None and "flash" in attn_implementation:
        return (
            f"attn_implementation: {attn_implementation} needs a package of its own. Leave it out: tunesmith attends "
            "with torch's flash kernel wherever the model allows."
        )
    return "Install what is missing."


def load_any(
    name: str, *, trainable_adapter: bool = False, dtype: str | torch.dtype | None = None, **options: Any
) -> PreTrainedModel:
    """A model folder or Hub id as it is; an adapter folder with its base underneath, as it was when it was trained.

    Args:
        trainable_adapter: go on training the adapter instead of only using it.
        options: as for `load_model`.
    """
    base = adapter_base(name)
    if base is None:
        return load_model(name, dtype=dtype, **options)
    check_base(name, base)
    *earlier, last = with_earlier([name])
    model = load_model(base, dtype=dtype, **options_with_positions(base, last, options))
    return put_on(merge_folders(model, earlier), last, trainable=trainable_adapter)


def options_with_positions(base: str, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `load_model` with the positions that the adapter in `folder` was trained on, if it says so."""
    told = remembered(folder).get("positions")
    if not told or "config" in options:
        return options
    return {**options, "config": with_positions(load_config(base, **config_options(options)), told)}


def config_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `load_model` that say where a config comes from."""
    names = ("gguf_file", "revision", "trust_remote_code", "cache_dir", "token")
    return {name: options[name] for name in names if name in options}


def load_config(name: str, gguf_file: str | None = None, **hub: Any) -> Any:
    """A model's config; raises ModelError if there is none."""
    check_folder(name, gguf_file)
    given = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoConfig.from_pretrained(name, **given, **hub)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{name}: its config.json cannot be loaded ({first_line(error)}). Give the folder of a model, or a Hub id "
            "that this machine can reach or has in its cache."
        ) from error


def check_folder(name: str, gguf_file: str | None = None) -> None:
    """Say what a local folder lacks before transformers looks for it on the Hub."""
    folder = Path(name)
    if not folder.exists():
        if not is_hub_id(name):
            raise ModelError(f"{name}: there is no such folder, and it is not a Hub id (owner/name).")
        return
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise ModelError(f"{name}: has no file {gguf_file}. It holds: {listing(folder)}.")
        if importlib.util.find_spec("gguf") is None:
            raise ModelError("gguf_file: GGUF files need another package. Install it: pip install 'tunesmith[gguf]'.")
    elif not (folder / "config.json").is_file() and not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{name}: is no model folder, config.json is missing. It holds: {listing(folder)}.")
    elif (
        not (folder / ADAPTER_CONFIG).is_file()
        and list(folder.glob("*.bin"))
        and not list(folder.glob("*.safetensors"))
    ):
        raise ModelError(
            f"{name}: has pickled weights (.bin) only, which can run code when opened. "
            "Convert them to safetensors first."
        )
    if (folder / "config.json").is_file():
        read_json(folder / "config.json", "Copy or download it again.")  # transformers blames the tokenizer


def lacks_weights(name: str) -> bool:
    """Whether a model's folder holds none: enough for looking at data, not for training."""
    folder = Path(name).expanduser()
    files = (folder / ADAPTER_CONFIG, *folder.glob("*.safetensors"), *folder.glob("*.gguf"))
    return (folder / "config.json").is_file() and not any(file.exists() for file in files)


def listing(folder: Path) -> str:
    """The first few names in a folder, for a message."""
    if not folder.is_dir():
        return "nothing, it is a file"
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError if the tokenizer can write an id for which the model has no embedding."""
    if not hasattr(model, "get_input_embeddings"):
        return  # a person's own module
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {rows} embeddings, "
            "so some text would crash it. Use the model's own tokenizer, or resize the embeddings and train them "
            "(lora_modules_to_save)."
        )


def without_gguf_marks(model: PreTrainedModel) -> PreTrainedModel:
    """Forget that the weights came from a GGUF file: they are plain floats now, and may be saved and trained.

    transformers 5.23 keeps the marks of the quantizer that read the file, and then refuses `save_pretrained`.
    """
    if getattr(getattr(model, "hf_quantizer", None), "quantization_config", None) is None:
        return model
    if str(getattr(model.hf_quantizer.quantization_config, "quant_method", "")).lower().endswith("gguf"):
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model


def first_line(error: Exception) -> str:
    """First sentence of another library's message."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")


def model_max_length(name: str, **hub: Any) -> int | None:
    """Longest sequence the model was built for, in tokens; `None` if its config does not say."""
    config = load_config(adapter_base(name) or name, **hub)
    told = remembered(name).get("positions") if adapter_base(name) else None
    config = with_positions(config, told) if told else config
    return getattr(config.get_text_config(), "max_position_embeddings", None)
