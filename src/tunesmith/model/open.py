"""A recipe's model options → a model that trains, or one that answers, and its tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.config import ModelFields
from tunesmith.errors import ConfigError
from tunesmith.lookup import did_you_mean
from tunesmith.model import attention
from tunesmith.model.adapt import adapt
from tunesmith.model.chain import (
    ADAPTER_CONFIG,
    adapter_base,
    adapter_folders,
    check_base,
    check_is_adapter,
    merge_folders,
    put_on,
    remembered,
    with_earlier,
)
from tunesmith.model.chat_format import embedding_rows, grow_embeddings
from tunesmith.model.load import check_vocabulary, load_config, load_model, load_tokenizer
from tunesmith.model.norms import hold_norms_in_float32
from tunesmith.model.quantize import is_quantized, quantization_options
from tunesmith.model.rope import ANSWER_FACTOR, stretched, training_factor, with_positions

Say = Callable[[str], None]


class Start(NamedTuple):
    """Where a model comes from."""

    weights: str
    """Folder or Hub id of the whole model underneath."""
    merged: tuple[str, ...] = ()
    """Adapter folders that are merged into it, in this order."""
    adapter: str | None = None
    """Adapter folder on top, which goes on training or answers."""

    @property
    def last(self) -> str | None:
        """The adapter that the model was last trained with."""
        return self.adapter or (self.merged[-1] if self.merged else None)


# ---- the doors ---------------------------------------------------------------------------------------------------


def open_tokenizer(options: ModelFields, *, say: Say | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that the model was last trained with: of the last folder in `checkpoint_dir` that has one, or the
    base's.

    Raises: ModelError, TemplateError as `load_tokenizer`.
    """
    if not options.use_fast_tokenizer and say is not None:
        say("use_fast_tokenizer: transformers 5 has no other tokenizers where a fast one exists; that one is taken")
    folders = [
        folder
        for folder in adapter_folders(options.checkpoint_dir)
        if options.adapter != "none" and (Path(folder) / "tokenizer_config.json").is_file()
    ]
    if folders:
        return load_tokenizer(folders[-1], trust_remote_code=options.trust_remote_code)
    return load_tokenizer(
        named_base(options),
        gguf_file=options.gguf_file,
        use_fast=options.use_fast_tokenizer,
        **hub_options(options),
    )


def open_for_training(
    options: ModelFields,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seed: int,
    max_length: int | None,
    use_cpu: bool,
    say: Say,
) -> nn.Module:
    """The model with what trains of it, on the CPU (quantized: on this process's device).

    Args:
        tokenizer: finds tokens whose embedding rows were never trained.
        seed: draws the first weights of a new adapter.
        max_length: the longest text, for `rope_scaling`.
        say: takes a line on each thing that was chosen or left out.

    Raises: ConfigError for options that contradict each other; ModelError for what cannot be loaded or does not fit.
    """
    if options.adapter == "none":
        raise ConfigError("adapter: none trains nothing. Set lora, full or freeze.")
    start = start_of(options, training=True, say=say)
    transformers.set_seed(seed)  # before adapters draw their first weights
    model = load_model(
        start.weights,
        dtype=training_dtype(options, use_cpu),
        **quantization_options(options, use_cpu),
        **load_options(options, start, max_length=max_length, training=True, say=say),
    )
    model = merge_folders(model, start.merged, say)
    if start.adapter is not None:
        model = put_on(model, start.adapter, trainable=True)
        config = model.peft_config["default"]
        say(f"adapter: {start.adapter} goes on training" + (f" (r {config.r})" if hasattr(config, "r") else ""))
    else:
        if tokenizer is not None:
            if tokenizer.eos_token_id == embedding_rows(model):  # new: the tokenizer had no stop token at all
                grow_embeddings(model, tokenizer, embedding_rows(model), None)
                say(f"tokens: {tokenizer.eos_token} is new to the model and got a row of its own")
            check_vocabulary(model, tokenizer)
        model = adapt(model, options, tokenizer, say)
    if options.upcast_layernorm:
        count = hold_norms_in_float32(model)
        say(f"upcast_layernorm: {count} norm tensors held in float32" + ("" if count else ", as all are already"))
    return model


def open_for_answers(options: ModelFields, *, use_cpu: bool, say: Say) -> nn.Module:
    """The model for inference on the fastest device: no gradients, in half precision on GPUs, float32 on CPUs.

    Raises: as `open_for_training`.
    """
    start = start_of(options, training=False, say=say)
    if start.last is None and options.adapter == "lora" and not options.checkpoint_dir:
        say(f"adapter: none is given, so {start.weights} answers as it is")
    on_gpu = torch.cuda.is_available() and not use_cpu
    stored = load_config(start.weights, options.gguf_file, **hub_options(options)) if on_gpu else None
    dtype = answer_dtype(options.dtype, getattr(stored, "dtype", None), on_gpu)
    bits = quantization_options(
        options, use_cpu=not on_gpu, training=False, compute_dtype=half_precision() if on_gpu else None
    )
    places = load_options(options, start, max_length=None, training=False, say=say)
    model = load_model(start.weights, dtype=dtype, **bits, **places)
    model = merge_folders(model, start.merged, say)
    if start.adapter is not None:
        model = put_on(model, start.adapter)
        as_the_rest(model)
    if not is_quantized(model):
        model = model.to("cuda" if on_gpu else "cpu")
    return model.requires_grad_(False).eval()


def longest_text(options: ModelFields, max_length: int | None = None, *, training: bool = True) -> int | None:
    """Tokens that the model can take once it is opened, `rope_scaling` included; `None` if its config does not say."""
    start = start_of(options, training=training, say=unsaid)
    config = settled_config(options, start, max_length=max_length, training=training, say=unsaid)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    layers = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if longest and layers.get("rope_type") == "dynamic":  # it says where stretching begins
        factor = options.rope_factor or (training_factor(longest, max_length) if training else ANSWER_FACTOR)
        return int(longest * factor)
    return longest


# ---- where it comes from -----------------------------------------------------------------------------------------


def start_of(options: ModelFields, *, training: bool, say: Say) -> Start:
    """Which weights and adapters the options name.

    Raises: ConfigError for a combination that has no meaning; ModelError for a folder that holds something else.
    """
    name, folders = named_base(options), adapter_folders(options.checkpoint_dir)
    base = adapter_base(name)
    if base is not None and folders:
        raise ConfigError(
            f"model_name_or_path: {name} is an adapter already, and checkpoint_dir names others. Name the base as "
            "model_name_or_path and all adapters, in their order, in checkpoint_dir; or remove checkpoint_dir."
        )
    if options.adapter == "none" and folders:
        raise ConfigError("checkpoint_dir has no effect with adapter: none. Remove one of them.")
    if options.adapter == "none" and base is not None:
        say(f"adapter: none, so that of {name} is left out and its base answers")
        return Start(base)
    if options.adapter != "lora" and (training or folders):
        return whole_start(options, name, folders, is_adapter=base is not None)
    if base is not None:
        check_base(name, base)
    for folder in folders:
        check_is_adapter(folder)
    chain = with_earlier([name] if base is not None else folders)
    return lora_start(options, base or name, chain, training=training, say=say)


def whole_start(options: ModelFields, name: str, folders: list[str], *, is_adapter: bool) -> Start:
    """Where weights come from that train themselves: the one folder of `checkpoint_dir`, else the base."""
    if is_adapter:
        raise ConfigError(f"adapter: {name} is a LoRA adapter, which only goes on as lora.")
    if len(folders) > 1:
        raise ConfigError(
            f"checkpoint_dir: adapter {options.adapter} begins with one folder of whole weights, got {len(folders)}: "
            f"{', '.join(folders)}. Keep one; only adapters (adapter: lora) are laid upon one another."
        )
    if folders and (Path(folders[0]) / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"checkpoint_dir: {folders[0]} is a LoRA adapter, and adapter {options.adapter} begins with whole "
            "weights. Set adapter: lora, or merge it first (tunesmith merge)."
        )
    return Start(folders[0] if folders else name)


def lora_start(options: ModelFields, base: str, chain: list[str], *, training: bool, say: Say) -> Start:
    """All adapters but the last are merged; the last goes on, unless a new one is to begin."""
    few_bits = options.load_in_4bit or options.load_in_8bit
    if few_bits and len(chain) > 1:
        raise ConfigError(
            f"checkpoint_dir: {', '.join(chain[:-1])} would have to be merged into a 4- or 8-bit base, which cannot "
            "hold the sum. Name one adapter, or load the base without load_in_4bit, load_in_8bit."
        )
    if not chain:
        return Start(base)
    if training and not options.resume_lora_training:
        if not few_bits:
            return Start(base, tuple(chain))
        say(f"resume_lora_training: {chain[-1]} goes on all the same, since a 4- or 8-bit base takes no merge")
    return Start(base, tuple(chain[:-1]), chain[-1])


def named_base(options: ModelFields) -> str:
    """`model_name_or_path`; raises ConfigError if it is missing."""
    if options.model_name_or_path is None:
        raise ConfigError("model_name_or_path is missing. Name a model folder or a Hub id.")
    return options.model_name_or_path


# ---- how it is loaded --------------------------------------------------------------------------------------------


def hub_options(options: ModelFields) -> dict[str, Any]:
    """What `from_pretrained` must know about where a model comes from."""
    found = {"revision": options.model_revision, "trust_remote_code": options.trust_remote_code}
    given = {"cache_dir": options.cache_dir, "token": options.hf_token}
    return found | {name: value for name, value in given.items() if value is not None}


def checked_attention(options: ModelFields) -> str | None:
    """`attn_implementation`; raises ConfigError for a name that transformers does not know.

    It takes `owner/name` as well, and runs what lies there on the Hub: not for a recipe, which may be anybody's.
    """
    name = options.attn_implementation
    known = sorted({"eager", *ALL_ATTENTION_FUNCTIONS} - {attention.NAME})
    if name is None or name in known or (options.trust_remote_code and "/" in name):
        return name
    if "/" in name:
        raise ConfigError(
            f"attn_implementation: {name} is code on the Hub. Add --trust_remote_code true if you trust it, or leave "
            "this out."
        )
    raise ConfigError(
        f"attn_implementation: there is no '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}. Leave it "
        "out for the model's default."
    )


def load_options(
    options: ModelFields, start: Start, *, max_length: int | None, training: bool, say: Say
) -> dict[str, Any]:
    """Arguments of `load_model` beside type and bits; a config only where positions are not the checkpoint's own."""
    found = {
        "attn_implementation": checked_attention(options),
        "gguf_file": options.gguf_file,
        **hub_options(options),
    }
    if options.rope_scaling is not None or told_positions(start):
        found["config"] = settled_config(options, start, max_length=max_length, training=training, say=say)
    return found


def settled_config(options: ModelFields, start: Start, *, max_length: int | None, training: bool, say: Say) -> Any:
    """The base's config with the positions of its last adapter, else those that `rope_scaling` asks for."""
    config = load_config(start.weights, options.gguf_file, **hub_options(options))
    if told := told_positions(start):
        if options.rope_scaling is not None:
            say(f"rope_scaling: positions stay those that {start.last} was trained on")
        return with_positions(config, told)
    if options.rope_scaling is None:
        return config
    factor = options.rope_factor
    return stretched(config, options.rope_scaling, factor, max_length=max_length, training=training, say=say)


def told_positions(start: Start) -> dict[str, Any]:
    """The positions that the last adapter was trained on, where its folder says so."""
    return (remembered(start.last).get("positions") or {}) if start.last is not None else {}


def training_dtype(options: ModelFields, use_cpu: bool) -> str:
    """float32, unless a frozen base may stay in the half precision it was saved in, which halves a GPU's memory."""
    if options.dtype != "auto":
        return options.dtype
    on_gpu = torch.cuda.is_available() and not use_cpu
    return "auto" if on_gpu and options.adapter == "lora" else "float32"


def answer_dtype(asked: str, stored: torch.dtype | None, on_gpu: bool) -> str | torch.dtype:
    """The type that answers fastest without loss: float32 on CPUs; on GPUs the stored half, or the GPU's own."""
    if asked != "auto":
        return asked
    if not on_gpu:
        return "float32"
    half = half_precision()
    return "auto" if half is torch.bfloat16 and stored in (torch.bfloat16, torch.float16) else half


def half_precision() -> torch.dtype:
    """bfloat16 where the GPU multiplies it itself, else float16."""
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def as_the_rest(model: nn.Module) -> None:
    """Hold modules that an adapter brings whole in the type of a half-precision base, which multiplies with them."""
    base = model.get_base_model().dtype
    if base not in (torch.bfloat16, torch.float16) or is_quantized(model):
        return
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(base)


def unsaid(line: str) -> None:
    """For callers that only want to know."""
