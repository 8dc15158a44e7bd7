"""Which parameters train: all of them, some layers, or low-rank adapters. `ADAPTERS` maps a name to a function."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.config import ModelFields
from tunesmith.errors import ConfigError, ModelError
from tunesmith.lookup import did_you_mean, lookup
from tunesmith.model.chat_format import release_padding_row, untrained_tokens
from tunesmith.model.lora import refuse_borrowed_embeddings, remember_first_weights
from tunesmith.model.quantize import is_quantized, prepare_for_kbit_training, quiet_bitsandbytes

Say = Callable[[str], None]

# What the parts of a layer are called from model to model; recipes for one name them for all.
ALIKE = (
    ("self_attn", "self_attention", "attention", "attn"),
    ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
)


def adapt(
    model: PreTrainedModel,
    config: ModelFields,
    tokenizer: PreTrainedTokenizerBase | None = None,
    say: Say | None = None,
) -> nn.Module:
    """Make `model` trainable the way `config.adapter` says; `tokenizer` and `say` as for `attach`.

    Raises: ConfigError for unknown adapters, modules, layers or tokens; ModelError for a quantized base alone.
    """
    function = lookup(ADAPTERS, config.adapter, "adapter")
    if function is lora:  # a person's own function takes two arguments
        return lora(model, config, tokenizer, say)
    model = function(model, config)
    check_trainable(model)
    return model


def full(model: PreTrainedModel, config: ModelFields) -> nn.Module:
    """Train every parameter."""
    return model.requires_grad_(True)


def freeze(model: PreTrainedModel, config: ModelFields) -> nn.Module:
    """Train some layers, or parts of them, and freeze the rest. Layers are matched by exact number: 1 is not 11."""
    model.requires_grad_(False)
    layers = decoder_layers(model)
    count = config.freeze_trainable_layers
    if count == 0 or abs(count) > len(layers):
        raise ConfigError(f"freeze_trainable_layers: {count} does not name 1 to {len(layers)} of the model's layers.")
    chosen = [dict(layer.named_children()) for layer in (layers[-count:] if count > 0 else layers[:-count])]
    known = list(dict.fromkeys(part for parts in chosen for part in parts))
    for name in config.freeze_trainable_modules or ["all"]:
        wanted = parts_named(name, known)
        for module in (parts[part] for parts in chosen for part in wanted if part in parts):
            module.requires_grad_(True)
    return model


def parts_named(name: str, known: list[str]) -> list[str]:
    """Which parts of a layer `name` means: `all`, the model's own name, or another model's name for it.

    Raises: ConfigError with the nearest name.
    """
    if name == "all":
        return known
    alike = next((group for group in ALIKE if name in group), ())
    found = [name] if name in known else [part for part in known if part in alike]
    if not found:
        raise ConfigError(
            f"freeze_trainable_modules: layers have no '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}."
        )
    return found


def lora(
    model: PreTrainedModel,
    config: ModelFields,
    tokenizer: PreTrainedTokenizerBase | None = None,
    say: Say | None = None,
) -> nn.Module:
    """Train low-rank updates beside frozen weights (LoRA, arXiv:2106.09685)."""
    from peft import LoraConfig

    wanted = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target_modules(config.lora_target_modules),
        modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=True if config.lora_init == "default" else config.lora_init,
        task_type="CAUSAL_LM",
    )
    if config.lora_trainable_tokens:
        add_trainable_tokens(wanted, model, token_ids(config.lora_trainable_tokens, tokenizer))
    return attach(model, wanted, tokenizer, say)


def target_modules(value: list[str] | str | None) -> list[str] | str | None:
    """Names of modules as peft takes them; `all` is its `all-linear`, and text may list names with commas.

    >>> target_modules("q_proj, v_proj"), target_modules("W_pack"), target_modules("all")
    (['q_proj', 'v_proj'], ['W_pack'], 'all-linear')
    """
    if isinstance(value, list) and len(value) == 1 and value[0] in ("all", "all-linear"):
        return "all-linear"
    if not isinstance(value, str) or value == "all-linear":
        return value
    names = [name.strip() for name in value.split(",") if name.strip()]
    if names == ["all"]:
        return "all-linear"
    return names if all(name.replace(".", "_").isidentifier() for name in names) else value  # else a pattern


def token_ids(names: list[str], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Ids of tokens by name; raises ConfigError for what is no token, with the nearest."""
    if tokenizer is None:
        raise ConfigError("lora_trainable_tokens: a tokenizer is needed to find tokens by name.")
    vocabulary = tokenizer.get_vocab()
    for name in names:
        if name not in vocabulary:
            hint = did_you_mean(name, tokenizer.get_added_vocab())
            raise ConfigError(f"lora_trainable_tokens: the tokenizer has no token '{name}'.{hint}")
    return [vocabulary[name] for name in names]


ADAPTERS: dict[str, Callable[..., nn.Module]] = {
    "full": full,
    "freeze": freeze,
    "lora": lora,
}


# ---- peft --------------------------------------------------------------------------------------------------------


def attach(
    model: nn.Module, peft_config: Any, tokenizer: PreTrainedTokenizerBase | None = None, say: Say | None = None
) -> nn.Module:
    """Wrap `model` with the adapter that `peft_config` describes; the config stays as it is.

    Args:
        tokenizer: with it, control tokens of its template whose embedding rows were never trained train, too.
        say: takes a line on each thing that was added; `None` warns.

    Raises: ConfigError for what is no peft config, a model that has an adapter, or a name in `target_modules` or
        `modules_to_save` that matches no module (peft says nothing).
    """
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config: expected a peft.PeftConfig such as LoraConfig, got {type(peft_config).__name__}."
        )
    refuse_virtual_tokens(peft_config)
    if has_adapter(model):
        raise ConfigError(
            "peft_config: the model has an adapter already. Leave peft_config out to go on training that adapter, or "
            "give model.merge_and_unload() to start a new one on top of it."
        )
    check_names(model, peft_config)
    peft_config = deepcopy(peft_config)
    if tokenizer is not None:
        for line in train_new_tokens(model, tokenizer, peft_config):
            say(line) if say is not None else warnings.warn(line, UserWarning, stacklevel=2)
    release_padding_row(model)
    quiet_bitsandbytes()
    if is_quantized(model):
        prepare_for_kbit_training(model)
    try:
        with warnings.catch_warnings():  # of transformers, for what peft asks of it
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            wrapped = get_peft_model(model, peft_config)
    except (ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"peft_config: {str(error).splitlines()[0]}") from error
    refuse_borrowed_embeddings(wrapped)
    remember_first_weights(wrapped)
    return wrapped


def refuse_virtual_tokens(peft_config: Any) -> None:
    """Raise ConfigError for methods that put trained vectors in front of each row: labels would not match logits."""
    if peft_config.is_prompt_learning and str(getattr(peft_config.peft_type, "value", "")) != "PREFIX_TUNING":
        raise ConfigError(
            f"peft_config: {type(peft_config).__name__} puts virtual tokens in front of each row, which moves the "
            "places of the loss. Use LoraConfig, or PrefixTuningConfig."
        )


def has_adapter(model: nn.Module) -> bool:
    """Whether peft has wrapped the model, or transformers' own `add_adapter` has."""
    return isinstance(getattr(model, "peft_config", None), dict) or getattr(model, "_hf_peft_config_loaded", False)


def check_names(model: nn.Module, peft_config: Any) -> None:
    """Raise ConfigError for a name that no module of the model has."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules() if name}
    for option in ("target_modules", "modules_to_save"):
        wanted = getattr(peft_config, option, None)
        if wanted is None or isinstance(wanted, str):  # a string is a pattern or "all-linear"
            continue
        for name in wanted:
            if name.rpartition(".")[2] not in names:
                raise ConfigError(f"{option}: the model has no module '{name}'.{did_you_mean(name, names)}")


def check_trainable(model: nn.Module) -> None:
    """Raise ModelError where training `model` would change nothing, or could not."""
    trained = any(parameter.requires_grad for parameter in model.parameters())
    if has_adapter(model) and not trained:
        raise ModelError(
            "every weight of the model's adapter is frozen, so nothing would train. Load it for training: "
            "PeftModel.from_pretrained(base, adapter, is_trainable=True)."
        )
    if isinstance(getattr(model, "peft_config", None), dict):
        refuse_virtual_tokens(model.active_peft_config)
    if is_quantized(model) and not has_adapter(model):
        raise ModelError(
            "a 4- or 8-bit model has no weights that could be trained. Train an adapter on it "
            "(peft_config=LoraConfig(...), in a recipe adapter: lora), or load it without load_in_4bit, load_in_8bit."
        )
    if not trained:
        raise ModelError("no parameter of the model is trainable. Set requires_grad, or give a peft_config.")


def train_new_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, peft_config: Any) -> list[str]:
    """Add to `peft_config` the embedding rows of control tokens that were never trained; returns a line on them.

    An adapter leaves embeddings frozen, so such tokens, the stop token among them, would stay noise: answers that
    never end. Nothing is added where the config trains or adapts the embeddings already.
    """
    tokens = untrained_tokens(model, tokenizer)
    embeddings, head = layer_name(model, model.get_input_embeddings()), own_head_name(model)
    open_layers = [name for name in (embeddings, head) if name is not None and not is_trained(peft_config, name)]
    if not tokens or not open_layers:
        return []
    names = ", ".join(tokens)
    what = f"the embedding rows of {names} were never trained, and the template or the end of texts needs them"
    if not hasattr(peft_config, "trainable_token_indices"):
        return [
            f"tokens: {what}. {type(peft_config).__name__} cannot train single rows: without LoraConfig("
            f"modules_to_save={open_layers}) or LoraConfig(trainable_token_indices=...) answers may never end."
        ]
    add_trainable_tokens(peft_config, model, list(tokens.values()), open_layers)
    return [f"tokens: {what}, so they train beside the adapter ({' and '.join(open_layers)})"]


def add_trainable_tokens(peft_config: Any, model: nn.Module, ids: list[int], layers: list[str] | None = None) -> None:
    """Let the rows `ids` of embeddings and head train, beside those that `peft_config` names already."""
    embeddings, head = layer_name(model, model.get_input_embeddings()), own_head_name(model)
    layers = [name for name in (embeddings, head) if name is not None] if layers is None else layers
    given = peft_config.trainable_token_indices or {}
    given = dict(given) if isinstance(given, dict) else {embeddings: list(given)}
    for name in layers:
        if name == head and model.get_output_embeddings().bias is not None:
            # peft 0.21 forgets the bias of a head whose rows train one by one
            peft_config.modules_to_save = [*(peft_config.modules_to_save or []), name]
        else:
            given[name] = sorted({*given.get(name, []), *ids})
    peft_config.trainable_token_indices = given


def is_trained(peft_config: Any, name: str) -> bool:
    """Whether the config trains the layer `name` whole, or puts an adapter on it."""
    for option in ("modules_to_save", "target_modules"):
        wanted = getattr(peft_config, option, None)
        if wanted is not None and not isinstance(wanted, str):
            if name in {given.rpartition(".")[2] for given in wanted}:
                return True
        elif wanted is not None and wanted != "all-linear" and name in wanted:  # a pattern that speaks of it
            return True
    return False


def layer_name(model: nn.Module, layer: nn.Module) -> str:
    """Last part of a layer's name: embed_tokens, wte, lm_head, ..."""
    return next(name for name, module in model.named_modules() if module is layer).rpartition(".")[2]


def own_head_name(model: nn.Module) -> str | None:
    """Name of the head; `None` if there is none, or it shares the embeddings' weight, which peft then follows."""
    head = model.get_output_embeddings()
    if head is None or head.weight is model.get_input_embeddings().weight:
        return None
    return layer_name(model, head)


# ---- freezing and types ------------------------------------------------------------------------------------------


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of equal blocks: the longest `ModuleList` of the model."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise ConfigError("adapter freeze: the model has no list of layers. Use lora or full.")
    return max(stacks, key=len)


def upcast_trainable(model: nn.Module) -> int:
    """Hold trained parameters in float32 where they were loaded in half precision; returns how many tensors changed.

    A bfloat16 weight has 8 bits: an update below 1/256 of its size is rounded away, so small rates train nothing.
    """
    changed = 0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
            changed += 1
    return changed


def hold_in_float32(model: nn.Module) -> int:
    """Hold frozen half-precision weights in float32 too, where trained ones are; returns how many tensors changed.

    Without autocast no layer multiplies the one type with the other. Adapters cast for themselves, but the modules
    that peft trains whole (`modules_to_save`) do not; packed weights of a quantized base stay packed.
    """
    trained = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = [dtype for name, dtype in trained.items() if not has_adapter(model) or "modules_to_save" in name]
    if torch.float32 not in whole or is_quantized(model):
        return 0
    halves = [parameter for parameter in model.parameters() if parameter.dtype in (torch.bfloat16, torch.float16)]
    for parameter in halves:
        parameter.data = parameter.data.float()
    return len(halves)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; a 4-bit tensor counts the values it packs, a sharded one those of all processes."""
    trained = total = 0
    for parameter in model.parameters():
        count = parameter.numel() or getattr(parameter, "ds_numel", 0)  # ZeRO-3 leaves an empty tensor here
        if parameter.__class__.__name__ == "Params4bit":
            count *= 2 * parameter.element_size()  # two values per stored byte
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


def trainable_line(model: nn.Module) -> str:
    """What trains, in the words of peft and LLaMA-Factory, whose logs scripts read."""
    trained, total = count_parameters(model)
    share = 100 * trained / total if total else 0.0
    return f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}"
