"""A model as one GGUF file, for llama.cpp, Ollama and LM Studio.

    tensors ── llama.cpp's names, its order of rotary rows ──► f32, f16, bf16 or q8_0
    tokenizer ── tokens, merges, which rule splits text ──► metadata          chat template ──► metadata

Only what is known to be the same there is written: the families of `FAMILIES`, byte-level BPE with a rule of
`SPLITTERS`. All else is refused with the way that remains. Keys and their meaning: the GGUF specification (ggml,
docs/gguf.md).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.errors import ConfigError, ModelError
from tunesmith.evaluate.generate import stop_token_ids

TYPES = ("f16", "q8_0", "bf16", "f32")
"""How matrices may be written; vectors are float32 in all of them."""


class Family(NamedTuple):
    """What llama.cpp calls a kind of model."""

    architecture: str
    turns_pairs: bool
    """It rotates neighbouring rows of queries and keys, where transformers rotates row i with row i + D/2."""


FAMILIES = {
    "llama": Family("llama", True),
    "mistral": Family("llama", True),
    "qwen2": Family("qwen2", False),
    "qwen3": Family("qwen3", False),
}
"""`model_type` of a config → its family."""

GPT2 = {"type": "ByteLevel", "use_regex": True}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTERS: dict[str, tuple[dict[str, Any], ...]] = {
    "gpt-2": (GPT2,),
    "smollm": ({"type": "Digits", "individual_digits": True}, GPT2),
    "llama-bpe": (
        {"type": "Split", "pattern": {"Regex": WORDS + r"\p{N}{1,3}" + REST}},
        {"type": "ByteLevel", "use_regex": False},
    ),
    "qwen2": (
        {"type": "Split", "pattern": {"Regex": WORDS + r"\p{N}" + REST}},
        {"type": "ByteLevel", "use_regex": False},
    ),
}
"""Name of a rule in llama.cpp → the steps of `pre_tokenizer` in a tokenizer.json that do the same."""


def write_gguf(model: nn.Module, tokenizer: Any, path: Path, *, kind: str, name: str) -> None:
    """Write `model` (float32, no adapter) and its tokenizer to `path`, tensor after tensor.

    Args:
        kind: one of `TYPES`.
        name: what the model calls itself.

    Raises: ConfigError for an unknown `kind`; ModelError for models and tokenizers that cannot be written exactly.
    """
    gguf = library()
    check_kind(kind)
    config = model.config.get_text_config()
    family, splitter = family_of(config), splitter_of(tokenizer)
    writer = gguf.GGUFWriter(path, family.architecture)
    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, config)
    add_tokenizer(writer, model, tokenizer, splitter)
    names = [(theirs, tensor, type_of(tensor, kind)) for theirs, tensor in tensors(model, config, family)]
    for theirs, tensor, own in names:
        quantized = gguf.GGMLQuantizationType[own.upper()]
        block, size = gguf.GGML_QUANT_SIZES[quantized]
        writer.add_tensor_info(theirs, tensor.shape, np.dtype("float32"), tensor.numel() // block * size, quantized)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor, own in names:
            values = tensor.detach().float().cpu().contiguous().numpy()
            writer.write_tensor_data(gguf.quants.quantize(values, gguf.GGMLQuantizationType[own.upper()]))
    finally:
        writer.close()


def check_kind(kind: str) -> None:
    """Raise ConfigError for what is none of `TYPES`."""
    if kind not in TYPES:
        raise ConfigError(f"type: expected one of {', '.join(TYPES)}, got '{kind}'.")


def library() -> Any:
    """The `gguf` package. Raises: ConfigError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("GGUF files need the package gguf: pip install 'tunesmith[gguf]'.") from error
    return gguf


# ---- what can be written -----------------------------------------------------------------------------------------


def family_of(config: Any) -> Family:
    """Raises: ModelError for a model that llama.cpp, or this writer, knows otherwise."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(f"GGUF: models of type '{config.model_type}' are not written here, only {known(FAMILIES)}.")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ModelError("GGUF: this model attends in sliding windows, which llama.cpp leaves out for its family.")
    if rope(config)["rope_type"] not in ("default", "linear", "llama3"):
        raise ModelError(f"GGUF: rope scaling '{rope(config)['rope_type']}' is not written here.")
    return family


def splitter_of(tokenizer: Any) -> str:
    """The rule by which llama.cpp splits text as `tokenizer` does.

    Raises: ModelError where none is known to be the same: wrong tokens would come out, and nobody would see it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = json.loads(backend.to_str()) if backend is not None else {}
    steps = whole.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    pieces = whole.get("model", {})
    for name, rule in SPLITTERS.items():
        same = len(steps) == len(rule) and all(own.items() <= step.items() for own, step in zip(rule, steps))
        # llama.cpp takes a word that is a token as it is under this one rule
        same &= bool(pieces.get("ignore_merges")) == (name == "llama-bpe")
        # NFC it leaves out, as convert_hf_to_gguf.py does: text is mostly in that form
        same &= (whole.get("normalizer") or {"type": "NFC"}) == {"type": "NFC"}
        if same and pieces.get("type") == "BPE" and not pieces.get("byte_fallback"):
            return name
    raise ModelError(
        f"GGUF: how this tokenizer splits text is none of the rules that are known here: {known(SPLITTERS)}. "
        "`tunesmith merge` writes a whole model, which llama.cpp's own convert_hf_to_gguf.py takes."
    )


def known(names: Any) -> str:
    """The names, comma-separated."""
    return ", ".join(names)


def rope(config: Any) -> dict[str, Any]:
    """How positions turn queries and keys: `rope_theta`, `rope_type` and what belongs to it."""
    return {"rope_type": "default", **(config.rope_parameters or {})}


# ---- metadata ----------------------------------------------------------------------------------------------------


def add_sizes(writer: Any, config: Any) -> None:
    """The sizes of the model."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(rope(config)["rope_theta"])
    if rope(config)["rope_type"] == "linear":
        writer.add_rope_scaling_type(library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope(config)["factor"])


def add_tokenizer(writer: Any, model: nn.Module, tokenizer: Any, splitter: str) -> None:
    """Tokens, merges, control tokens and the chat template."""
    tokens, types = vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_eot_token_id, end_of_turn(model, tokenizer)),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id])
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def vocabulary(tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    """The text of each of the embedding's rows, and llama.cpp's kind of token; rows that no token has are unused."""
    kinds = library().TokenType
    tokens, types = [f"[PAD{row}]" for row in range(rows)], [int(kinds.UNUSED)] * rows
    added = tokenizer.added_tokens_decoder
    for text, row in tokenizer.get_vocab().items():
        tokens[row], types[row] = text, int(kinds.NORMAL)
        if row in added:
            types[row] = int(kinds.CONTROL if added[row].special else kinds.USER_DEFINED)
    return tokens, types


def end_of_turn(model: nn.Module, tokenizer: Any) -> int | None:
    """A stop token beside the end of text, if there is one: llama.cpp has a place for one of a kind."""
    return next((token for token in stop_token_ids(model, tokenizer) if token != tokenizer.eos_token_id), None)


# ---- tensors -----------------------------------------------------------------------------------------------------


def tensors(model: nn.Module, config: Any, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under llama.cpp's name, in its order of rows.

    Raises: ModelError for a weight that has no name there.
    """
    gguf = library()
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    if rope(config)["rope_type"] == "llama3":
        yield "rope_freqs.weight", slower(model, config)
    for name, tensor in model.state_dict().items():
        if tied and head is not None and name == "lm_head.weight":
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ModelError(f"GGUF: llama.cpp has no name for {name} in its family {family.architecture}.")
        if family.turns_pairs and ".q_proj." in name:
            tensor = neighbours(tensor, config.num_attention_heads)
        elif family.turns_pairs and ".k_proj." in name:
            tensor = neighbours(tensor, config.num_key_value_heads)
        yield theirs, tensor


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows i and i + D/2 of each head, which turn together, one behind the other."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def slower(model: nn.Module, config: Any) -> Tensor:
    """By how much each pair of rows turns slower than without scaling, (D / 2,)."""
    scaled = next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
    places = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    return rope(config)["rope_theta"] ** -places / scaled.float().cpu()


def type_of(tensor: Tensor, kind: str) -> str:
    """How a tensor is written: vectors whole, and matrices whose rows are no multiple of a block in half precision."""
    if tensor.dim() < 2:
        return "f32"
    return "f16" if kind == "q8_0" and tensor.shape[-1] % 32 else kind
