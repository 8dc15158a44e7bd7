"""Prompts → texts: decoding options, stop tokens, batched generation.

A prompt's answer does not depend on the batch it was in: rows are padded on the left and masked, the tokenizer and
the model's own generation config are left as they are, and only new tokens are decoded.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.config import DecodingConfig
from tunesmith.data.render import Rendered, control_tokens, render_prompt
from tunesmith.data.rows import RowError
from tunesmith.data.tokenize import tokenize
from tunesmith.errors import ConfigError, DataError
from tunesmith.lookup import did_you_mean

DEFAULT_NEW_TOKENS = 256
PROBE = "tunesmith"  # a text that a template passes through unchanged


class Prompt(NamedTuple):
    """What the model is given to continue."""

    text: str
    """For people: text that looks like a control token need not be one."""
    input_ids: list[int]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    chat_template: str | None = None,
    where: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Prompt:
    """The conversation up to where its answer begins, exactly as training shows it before that answer.

    Raises: TemplateError, RowError as `data.render.render_prompt` and `data.tokenize.tokenize`; each begins with
        `where`.
    """
    rendered = render_prompt(
        messages,
        tokenizer,
        tools=tools,
        chat_template=chat_template,
        where=where,
        chat_template_kwargs=chat_template_kwargs,
    )
    return encode_rendered(tokenizer, rendered, where)


def encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: Rendered, where: str = "") -> Prompt:
    """A rendered prompt with its ids."""
    try:
        return Prompt(rendered.text, tokenize([rendered], tokenizer)[0]["input_ids"])
    except RowError as error:
        raise RowError(f"{where}{error}", error.reason) from error


def stop_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> list[int]:
    """Tokens that end an answer: the tokenizer's and the model's end of sequence, and the template's end of turn.

    The last matters for a base model trained with a chat template: its end-of-sequence token is another one.
    """
    own = getattr(model, "generation_config", None)
    ids = getattr(own, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(ids if isinstance(ids, (list, tuple)) else [ids])]
    found.append(template_stop_id(tokenizer, chat_template))
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def template_stop_id(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> int | None:
    """The control token that the chat template puts right after an assistant's text, or None if it puts none."""
    if not (chat_template or tokenizer.chat_template):
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False)
    except Exception:  # a template with demands of its own; the other stop tokens remain
        return None
    _, found, after = text.rpartition(PROBE)
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    controls = tokenizer.convert_tokens_to_ids(list(control_tokens(tokenizer)))
    return ids[0] if ids and ids[0] in controls else None


def generation_config(
    decoding: DecodingConfig | Mapping[str, Any] | None, stop_ids: Sequence[int], pad_id: int
) -> GenerationConfig:
    """The decoding options as transformers reads them.

    Raises: ConfigError for an unknown decoding option.
    """
    options = decoding_options(decoding)
    return GenerationConfig(
        max_new_tokens=options["max_new_tokens"],
        num_beams=options["num_beams"],
        repetition_penalty=options["repetition_penalty"],
        do_sample=options["do_sample"],
        # Without sampling these are the values that transformers takes for "not set"; others make it warn.
        temperature=options["temperature"] if options["do_sample"] else 1.0,
        top_p=options["top_p"] if options["do_sample"] else 1.0,
        top_k=options["top_k"] if options["do_sample"] else 50,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )


def decoding_options(decoding: DecodingConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """All decoding options by name; those not given have the defaults of `DecodingConfig`."""
    if decoding is None or isinstance(decoding, Mapping):
        options = dataclasses.asdict(DecodingConfig())
        unknown = sorted(set(decoding or {}) - set(options))
        if unknown:
            raise ConfigError(f"unknown decoding option '{unknown[0]}'.{did_you_mean(unknown[0], options)}")
        options |= dict(decoding or {})
    else:
        options = dataclasses.asdict(decoding)
    return options | {"max_new_tokens": options["max_new_tokens"] or DEFAULT_NEW_TOKENS}


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    decoding: DecodingConfig | Mapping[str, Any] | None = None,
    stop_ids: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, str]]:
    """Answer every prompt; yields (index of the prompt, answer) as batches finish, longest prompts first.

    Args:
        model: generates on its own device; training mode comes back afterwards.
        tokenizer: not changed, whatever its padding side.
        prompts: token ids, `encode_prompt(...).input_ids`.
        decoding: see `DecodingConfig`.
        stop_ids: tokens that end an answer. None: `stop_token_ids`.
        progress: called with (answered, all) after each batch.

    Raises: DataError for a prompt without tokens.
    """
    options = decoding_options(decoding)
    stop_ids = stop_token_ids(model, tokenizer) if stop_ids is None else list(stop_ids)
    empty = next((index for index, prompt in enumerate(prompts) if not prompt), None)
    if empty is not None:
        raise DataError(f"prompt {empty} has no tokens, so there is nothing to answer. Give it some text.")
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    config = generation_config(options, stop_ids, pad_id=padding_id(tokenizer, stop_ids))
    size = options["generation_batch_size"]
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        for index, answer in zip(batch, generate_batch(model, [prompts[index] for index in batch], config)):
            yield index, decode_answer(tokenizer, answer, stop_ids)
        if progress:
            progress(start + len(batch), len(order))


def generate_batch(model: PreTrainedModel, rows: Sequence[Sequence[int]], config: GenerationConfig) -> list[list[int]]:
    """New tokens for each row of prompt ids, padding and stop tokens included."""
    width = max(len(row) for row in rows)
    input_ids = torch.tensor([[config.pad_token_id] * (width - len(row)) + list(row) for row in rows])  # (B, S)
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    device = model.get_input_embeddings().weight.device
    with answering(model):
        output = model.generate(
            input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), generation_config=config
        )
    return output[:, width:].tolist()


@contextmanager
def answering(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients, its own generation config set aside; all comes back as it was.

    transformers fills what a passed generation config leaves open from the model's, so sampling habits (`min_p`,
    `no_repeat_ngram_size`, ...) would slip in.
    `no_grad` and not `inference_mode`: what a model caches while it answers (rotary tables, masks) must still be
    usable by the training that goes on afterwards.
    """
    training = [module for module in model.modules() if module.training]
    own = [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]
    model.eval()
    try:
        for module, _ in own:
            module.generation_config = GenerationConfig()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for module, config in own:
            module.generation_config = config


def padding_id(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> int:
    """Any token will do: padding is masked in the prompt and cut off the answer."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(stop_ids[0]) if stop_ids else 0


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """The text before the first stop token."""
    stops = set(stop_ids)
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
