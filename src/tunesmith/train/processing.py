"""The tokenizer or processor that a trainer is given, with the options that change it; the caller's stays as it is."""

import copy
import warnings
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunesmith.data.templates import use_template
from tunesmith.errors import ConfigError
from tunesmith.lookup import did_you_mean
from tunesmith.model.load import load_tokenizer
from tunesmith.train.options import SFTConfig, loading

# Arguments of `from_pretrained` that say where model and tokenizer come from.
FROM_THE_SAME_PLACE = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only", "subfolder")


def one_of(processing_class: Any, tokenizer: Any) -> Any:
    """`processing_class`, or what stands under its older name.

    Raises: ConfigError if both are given.
    """
    if tokenizer is None:
        return processing_class
    if processing_class is not None:
        raise ConfigError("tokenizer and processing_class are two names of one argument. Give processing_class only.")
    warnings.warn("SFTTrainer: tokenizer= is the older name of processing_class=.", FutureWarning, stacklevel=3)
    return tokenizer


def processing_for(model: Any, given: Any, args: SFTConfig) -> Any:
    """What renders and tokenizes for `model`: the given one, or the model's own; a copy where `args` change it.

    Raises: ConfigError where nothing says which tokenizer, or `eos_token` or `pad_token` is none of its tokens.
    """
    if given is None:
        given = own_tokenizer(model, args)
    elif getattr(tokenizer_in(given), "padding_side", "right") != "right":
        warnings.warn(
            f"the tokenizer's padding_side is '{tokenizer_in(given).padding_side}'. In training rows are laid end to "
            "end, or padded where the option padding_side says, so it has no effect there.",
            UserWarning,
            stacklevel=3,
        )
    changes = {"eos_token": args.eos_token, "pad_token": args.pad_token}
    changes = {key: value for key, value in changes.items() if value is not None}
    if args.chat_template is not None:  # knows the tokens asked for, and does not overrule them
        given = templated(changed(given, changes), args.chat_template)
    return changed(given, changes)


def tokenizer_in(processing_class: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a processor, or the tokenizer itself; `None` in image processors and feature extractors."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return processing_class
    return getattr(processing_class, "tokenizer", None)


def own_tokenizer(model: Any, args: SFTConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model's weights, of the same revision; the stop token pads where nothing else does."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        raise ConfigError("processing_class is missing, and the model was not loaded by a name. Give its tokenizer.")
    asked = loading(args)
    tokenizer = load_tokenizer(name, **{key: asked[key] for key in FROM_THE_SAME_PLACE if key in asked})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def templated(processing_class: Any, chat_template: str) -> Any:
    """A copy of a tokenizer or processor with another chat template; itself if it has that one."""
    tokenizer = _required_tokenizer(processing_class, "chat_template")
    other = use_template(tokenizer, chat_template)
    return processing_class if other is tokenizer else _with_tokenizer(processing_class, other)


def changed(processing_class: Any, changes: dict[str, str]) -> Any:
    """A copy of a tokenizer or processor with other special tokens; itself if nothing differs."""
    if not changes:
        return processing_class
    tokenizer = _required_tokenizer(processing_class, ", ".join(changes))
    if all(getattr(tokenizer, key) == value for key, value in changes.items()):
        return processing_class
    tokenizer = copy.deepcopy(tokenizer)
    for key, value in changes.items():
        if value not in tokenizer.get_vocab():
            hint = did_you_mean(value, tokenizer.all_special_tokens)
            raise ConfigError(f"{key}: the tokenizer has no token {value!r}.{hint} Name one of its tokens.")
        setattr(tokenizer, key, value)
    return _with_tokenizer(processing_class, tokenizer)


def _required_tokenizer(processing_class: Any, options: str) -> PreTrainedTokenizerBase:
    tokenizer = tokenizer_in(processing_class)
    if tokenizer is None:
        raise ConfigError(f"{options}: {type(processing_class).__name__} has no tokenizer. Give one that has.")
    return tokenizer


def _with_tokenizer(processing_class: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer itself, or a copy of the processor around it, which renders with the same template."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return tokenizer
    processing_class = copy.deepcopy(processing_class)
    processing_class.tokenizer, processing_class.chat_template = tokenizer, tokenizer.chat_template
    return processing_class


SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def special_ids(model: Any) -> dict[tuple[str, str], Any]:
    """The special ids in a model's configs, by config and name."""
    return {(kind, name): getattr(config, name, None) for kind, config in _configs(model) for name in SPECIAL_IDS}


def mend_special_ids(model: Any, before: dict[tuple[str, str], Any]) -> None:
    """Take back what transformers' trainer wrote into the model's configs from the tokenizer, where it does harm.

    A padding id that is also a stop token makes `generate` take the stop tokens of a prompt for padding, and answer
    nothing (huggingface/transformers#48016). Up to 5.17 an id that the tokenizer lacks was erased (#48592). A stop
    token that the tokenizer brings stays.
    """
    for kind, config in _configs(model):
        stops = getattr(config, "eos_token_id", None)
        stops = stops if isinstance(stops, list | tuple) else [stops]
        for name in SPECIAL_IDS:
            old, new = before.get((kind, name)), getattr(config, name, None)
            if (new is None and old is not None) or (name == "pad_token_id" and new != old and new in stops):
                setattr(config, name, old)


def _configs(model: Any) -> list[tuple[str, Any]]:
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [("model", config), ("generation", getattr(model, "generation_config", None))]
    return [(kind, one) for kind, one in found if one is not None]
