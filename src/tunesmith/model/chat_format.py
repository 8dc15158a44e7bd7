"""A base model learns a chat format: control tokens, template, embedding rows; and which rows were never trained."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AddedToken, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.errors import ConfigError
from tunesmith.lookup import did_you_mean


class ChatFormat(NamedTuple):
    """The control tokens and the template of a chat format."""

    bos_token: str
    eos_token: str
    pad_token: str
    chat_template: str


CHAT_FORMATS: dict[str, ChatFormat] = {
    "chatml": ChatFormat(
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=(
            "{% for message in messages %}"
            "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
    ),
}


def setup_chat_format(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    format: str = "chatml",
    resize_to_multiple_of: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Give a base model and its tokenizer the tokens and the template of a chat format; both are changed.

    Padding becomes the stop token, as this function has always done. With TRL's collators that hid the stop token from
    the loss; here padding is ignored by its place, so the stop token is trained and answers end.

    The new tokens' rows start near the mean of the others (transformers' resize draws them there), so that they
    neither win nor lose against every known token at first. They must be trained: with an adapter, `SFTTrainer` adds
    them to what it trains. Rows the model has beyond its tokenizer are kept, never cut off.

    Args:
        format: name in `CHAT_FORMATS`.
        resize_to_multiple_of: round the number of embedding rows up to a multiple, which some hardware likes.

    Returns: the same model and tokenizer.
    Raises: ConfigError for an unknown format, or a tokenizer that has a template already.
    """
    if tokenizer.chat_template is not None:
        raise ConfigError(
            "Chat template is already added to the tokenizer. If you want to overwrite it, please set it to None "
            "(tokenizer.chat_template = None)."
        )
    if format not in CHAT_FORMATS:
        raise ConfigError(
            f"Format {format} not available.{did_you_mean(format, CHAT_FORMATS)} "
            f"Please use one of {', '.join(CHAT_FORMATS)}."
        )
    chat_format, known = CHAT_FORMATS[format], len(tokenizer)
    tokenizer.add_special_tokens(
        {role: getattr(chat_format, role) for role in ("bos_token", "eos_token", "pad_token")}
    )
    tokenizer.chat_template = chat_format.chat_template
    grow_embeddings(model, tokenizer, known, resize_to_multiple_of)
    for config in stop_configs(model):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def clone_chat_template(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_tokenizer_path: str,
    resize_to_multiple_of: int | None = 64,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]]:
    """Give a model and its tokenizer the template, stop token and added tokens of another tokenizer; both are changed.

    As in TRL 1.16: tokens `<extra_id_0>`, ... stand for the rows that rounding up added. Unlike there, rows the model
    had beyond its tokenizer are kept, and get such tokens too.

    Returns: model, tokenizer, and the ids of all added tokens, `<extra_id_...>` included.
    Raises: ConfigError where the source has no template.
    """
    source = AutoTokenizer.from_pretrained(source_tokenizer_path)
    if source.chat_template is None:
        raise ConfigError(f"source_tokenizer_path: the tokenizer of {source_tokenizer_path} has no chat template.")
    known, vocabulary = len(tokenizer), tokenizer.get_vocab()
    added = [token for token in source.added_tokens_decoder.values() if token.content not in vocabulary]
    tokenizer.add_tokens(added)
    tokenizer.chat_template = source.get_chat_template()
    tokenizer.eos_token = source.eos_token
    grow_embeddings(model, tokenizer, known, resize_to_multiple_of)
    for config in stop_configs(model):
        config.eos_token_id = tokenizer.eos_token_id
    names = [token.content for token in added] + fill_vocabulary(tokenizer, embedding_rows(model))
    return model, tokenizer, tokenizer.convert_tokens_to_ids(names)


def fill_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    """Add `<extra_id_0>`, ... until the tokenizer has a token for every row; returns the new names."""
    names, vocabulary, number = [], tokenizer.get_vocab(), 0
    while len(vocabulary) + len(names) < rows:
        name, number = f"<extra_id_{number}>", number + 1
        if name not in vocabulary:
            names.append(name)
    tokenizer.add_tokens([AddedToken(name) for name in names])
    return names


def stop_configs(model: nn.Module) -> list[Any]:
    """Every config that says where a text begins and ends: the model's, its text part's, the generation's."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    generation = getattr(model, "generation_config", None)
    unique = {id(found): found for found in (config, text, generation) if found is not None}
    return list(unique.values())


def grow_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, known: int, multiple_of: int | None
) -> None:
    """A row for every token, and near the mean each row that no token had before; never fewer rows than there were."""
    spare, rows = embedding_rows(model), max(len(tokenizer), embedding_rows(model))
    model.resize_token_embeddings(rows, pad_to_multiple_of=multiple_of)
    release_padding_row(model)
    head = model.get_output_embeddings()
    for module in (model.get_input_embeddings(), head):
        if module is not None:
            weight = module.weight.data
            weight[known : min(spare, len(tokenizer))] = weight[:known].float().mean(0).to(weight.dtype)


def embedding_rows(model: nn.Module) -> int:
    """Rows of the input embeddings."""
    return model.get_input_embeddings().weight.shape[0]


def release_padding_row(model: nn.Module) -> bool:
    """Let the padding token's row train where that token also begins or ends texts; says whether it was held.

    `nn.Embedding(padding_idx=...)` drops that row's gradient. It needs none of its own: no position of padding reaches
    the loss. But where padding is the stop token, the stop token's row would never learn that a turn is over.
    """
    embeddings = model.get_input_embeddings()
    row = getattr(embeddings, "padding_idx", None)
    if row is None:
        return False
    uses: list[Any] = []
    for config in stop_configs(model):
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(config, name, None)
            uses += value if isinstance(value, list) else [value]
    if row in uses:
        embeddings.padding_idx = None
    return row in uses


# ---- rows that no training touched -------------------------------------------------------------------------------


def untrained_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Control tokens of the template, and the stop token, whose embedding rows no training has touched: name → id.

    Found in the weights, so that it does not matter who added the tokens, or when: a row is untrained if it is zero,
    lies at the mean of all rows (where resizing puts new ones), or at another control token's (training has moved all
    unused rows alike: those of SmolLM2 lie 0.4 % of a usual distance apart). "At" is within 1 % of a usual distance.
    """
    rows_of = model.get_input_embeddings().weight.detach()
    candidates = {name: index for name, index in template_tokens(tokenizer).items() if index < len(rows_of)}
    if not candidates:
        return {}
    mean = rows_of.mean(0, dtype=torch.float32)
    usual = (rows_of[:: max(1, len(rows_of) // 1024)].float() - mean).norm(dim=1).median()
    controls = [index for index in tokenizer.added_tokens_decoder if index < len(rows_of)]
    return {
        name: index
        for name, index in candidates.items()
        if is_untrained(rows_of[index].float(), mean, rows_of[[i for i in controls if i != index]].float(), usual)
    }


def is_untrained(row: Tensor, mean: Tensor, others: Tensor, usual: Tensor) -> bool:
    """Whether a row (H,) is zero, or lies at the mean (H,) or at one of the others (N, H); `usual` is a distance."""
    nearest = torch.stack([row.norm(), (row - mean).norm(), *(others - row).norm(dim=1)]).min()
    return bool(nearest < 0.01 * usual)


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Added tokens that the chat template writes, and the stop token, by name."""
    template = tokenizer.chat_template or ""
    template = " ".join(template.values()) if isinstance(template, dict) else template
    named = {tokenizer.eos_token} | {getattr(tokenizer, role) for role in ("bos_token",) if role in template}
    found = {}
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.content in named or token.content in template:
            found[token.content] = index
    return found
