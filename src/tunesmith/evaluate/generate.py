"""Prompts → texts: decoding options, stop tokens, batched generation.

A prompt's answer does not depend on the batch it was in, nor on the process that wrote it: rows are padded on the left
and masked, the tokenizer and the model's own generation config are left as they are, a row that is sampled draws from
(seed, its number), and only new tokens are decoded. Only beam search that samples draws for a whole batch.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from tunesmith.config import DecodingConfig
from tunesmith.data.render import Rendered, control_tokens, render_prompt
from tunesmith.data.rows import RowError
from tunesmith.data.tokenize import tokenize
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate.sampling import is_plain_sampling, row_sampling, seeded
from tunesmith.lookup import did_you_mean
from tunesmith.model.mixed_types import types_joined

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


# ---- options -------------------------------------------------------------------------------------------------------


def answer_decoding(
    decoding: DecodingConfig | Mapping[str, Any] | None,
    *,
    generation_max_length: int | None = None,
    generation_num_beams: int | None = None,
    max_target_length: int | None = None,
) -> dict[str, Any]:
    """The decoding options of evaluation and prediction, settled.

    Beams are `eval_num_beams`, else `generation_num_beams`, else `num_beams`. (In LLaMA-Factory the first two are
    dead: its own `num_beams=1` always wins.) The longest answer is `max_new_tokens`, else `generation_max_length`,
    else `max_target_length`, else 256 tokens. All of them count new tokens; transformers' `generation_max_length`
    counts the prompt too, which for a causal model leaves long prompts no room to be answered.
    """
    options = known_options(decoding)
    lengths = (options["max_new_tokens"], generation_max_length, max_target_length, DEFAULT_NEW_TOKENS)
    options["max_new_tokens"] = next(length for length in lengths if length)
    options["num_beams"] = options["eval_num_beams"] or generation_num_beams or options["num_beams"]
    return options | {"eval_num_beams": None}


def decoding_options(decoding: DecodingConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """All decoding options by name; those not given have the defaults of `DecodingConfig`."""
    options = known_options(decoding)
    return options | {"max_new_tokens": options["max_new_tokens"] or DEFAULT_NEW_TOKENS}


def known_options(decoding: DecodingConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """The same, with nothing put in the place of `None`.

    Raises: ConfigError for an unknown decoding option.
    """
    if decoding is not None and not isinstance(decoding, Mapping):
        return dataclasses.asdict(decoding)
    options = dataclasses.asdict(DecodingConfig())
    unknown = sorted(set(decoding or {}) - set(options))
    if unknown:
        raise ConfigError(f"unknown decoding option '{unknown[0]}'.{did_you_mean(unknown[0], options)}")
    return options | dict(decoding or {})


def generation_config(
    decoding: DecodingConfig | Mapping[str, Any] | None, stop_ids: Sequence[int], pad_id: int
) -> GenerationConfig:
    """The decoding options as transformers reads them; there is no `max_length`, which would count the prompt.

    Logits that are NaN or infinite are replaced (transformers' `InfNanRemoveLogitsProcessor`), so that a model gone
    bad gives bad answers, and not the end of an evaluation.

    Raises: ConfigError for an unknown decoding option.
    """
    options = decoding_options(decoding)
    return GenerationConfig(
        max_new_tokens=options["max_new_tokens"],
        num_beams=options["num_beams"],
        # Without beams transformers warns of any value but its default.
        length_penalty=options["length_penalty"] if options["num_beams"] > 1 else 1.0,
        repetition_penalty=options["repetition_penalty"],
        do_sample=options["do_sample"],
        # Without sampling these are the values that transformers takes for "not set"; others make it warn.
        temperature=options["temperature"] if options["do_sample"] else 1.0,
        top_p=options["top_p"] if options["do_sample"] else 1.0,
        top_k=options["top_k"] if options["do_sample"] else 50,
        remove_invalid_values=True,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that prompt and answer may have together; `None` where the model's config does not say.

    A rope that is stretched is given its factor: some configs have multiplied by it already, others have not.
    """
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("factor") if isinstance(rope, Mapping) else None
    return int(limit * max(1, factor or 1)) if isinstance(limit, int) and limit > 0 else None


# ---- answers -------------------------------------------------------------------------------------------------------


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]] | Mapping[int, Sequence[int]],
    *,
    decoding: DecodingConfig | Mapping[str, Any] | None = None,
    stop_ids: Sequence[int] | None = None,
    seed: int | None = None,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, str]]:
    """Answer every prompt; yields (number of the prompt, answer) as batches finish, longest prompts first.

    Args:
        model: generates on its own device; training mode comes back afterwards.
        tokenizer: not changed, whatever its padding side.
        prompts: token ids, `encode_prompt(...).input_ids`, in their order or by their numbers.
        decoding: see `DecodingConfig`.
        stop_ids: tokens that end an answer. None: `stop_token_ids`.
        seed: of sampling. None: drawn from torch's random numbers.
        share: (rank, world), as in `generate_ids`.
        progress: called with (answered, all) after each batch.

    Raises: DataError for a prompt without tokens, and for one that leaves no room for an answer.
    """
    options = decoding_options(decoding)
    stop_ids = stop_token_ids(model, tokenizer) if stop_ids is None else list(stop_ids)
    answers = generate_ids(
        model,
        prompts if isinstance(prompts, Mapping) else dict(enumerate(prompts)),
        generation_config(options, stop_ids, pad_id=padding_id(tokenizer, stop_ids)),
        batch_size=options["generation_batch_size"],
        seed=seed,
        share=share,
        progress=progress,
    )
    for number, answer in answers:
        yield number, decode_answer(tokenizer, answer, stop_ids)


def generate_ids(
    model: PreTrainedModel,
    prompts: Mapping[int, Sequence[int]],
    config: GenerationConfig,
    *,
    batch_size: int,
    seed: int | None = None,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """New tokens of every prompt, a stop token at the end included, padding not.

    Args:
        prompts: number → token ids; the numbers decide what is drawn where answers are sampled.
        config: its `max_new_tokens` and `pad_token_id` are set.
        batch_size: prompts at once.
        seed: of sampling. None: drawn from torch's random numbers.
        share: (rank, world): this process answers every `world`-th batch, and all together answer each prompt once.
            (Where they hold parts of one model each must run as many batches as the others, so some answers come
            twice.)
        progress: called with (answered, all) of this process.

    Raises: as `generate_texts`.
    """
    if config.do_sample and seed is None:
        seed = int(torch.randint(2**62, ()))
    rank, world = share
    plan = planned(model, prompts, config, min(batch_size, -(-len(prompts) // world) or 1))
    mine = plan[rank::world]
    synced = world > 1 and is_sharded(model)
    if synced and len(mine) < -(-len(plan) // world):
        mine = [*mine, plan[0]]
    done, total = 0, sum(len(numbers) for numbers, _ in mine)
    for numbers, room in mine:
        limited = copy.deepcopy(config)
        limited.max_new_tokens = room
        seeds = None if seed is None else [(seed, number) for number in numbers]
        answers = generate_batch(model, [prompts[number] for number in numbers], limited, seeds, synced_gpus=synced)
        yield from zip(numbers, (trimmed(answer, config) for answer in answers), strict=True)
        done += len(numbers)
        if progress:
            progress(done, total)


def planned(
    model: PreTrainedModel, prompts: Mapping[int, Sequence[int]], config: GenerationConfig, batch_size: int
) -> list[tuple[list[int], int]]:
    """Batches as (numbers of the prompts, new tokens), long prompts first; one with less room stands alone."""
    limit = context_length(model)
    for number, prompt in prompts.items():
        if not prompt:
            raise DataError(f"prompt {number} has no tokens, so there is nothing to answer. Give it some text.")
        if limit is not None and len(prompt) >= limit:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens, but the model reads {limit} at most, the answer included. "
                "Shorten it (max_source_length), or leave it out."
            )
    order = sorted(prompts, key=lambda number: -len(prompts[number]))
    rooms = {number: min(config.max_new_tokens, (limit or 2**62) - len(prompts[number])) for number in order}
    narrow = [number for number in order if rooms[number] < config.max_new_tokens]
    wide = order[len(narrow) :]
    batches = [wide[start : start + batch_size] for start in range(0, len(wide), batch_size)]
    return [([number], rooms[number]) for number in narrow] + [(batch, config.max_new_tokens) for batch in batches]


def generate_batch(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    config: GenerationConfig,
    seeds: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> list[list[int]]:
    """New tokens for each row of prompt ids, padding and stop tokens included.

    Args:
        seeds: where answers are sampled, what each row draws from. None: torch's random numbers.
        options: further arguments of `model.generate`.
    """
    width = max(len(row) for row in rows)
    input_ids = torch.tensor([[config.pad_token_id] * (width - len(row)) + list(row) for row in rows])  # (B, S)
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    device = model.get_input_embeddings().weight.device
    if config.do_sample and seeds is not None and is_plain_sampling(config):
        config, options["logits_processor"] = row_sampling(config, seeds)
    with answering(model), whole(model), seeded(seeds[0] if config.do_sample and seeds else None, device):
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=config,
            **options,
        )
    return output[:, width:].tolist()


def trimmed(answer: Sequence[int], config: GenerationConfig) -> list[int]:
    """Up to and with the first stop token; what follows is padding."""
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    end = next((place for place, token in enumerate(answer) if token in stops), len(answer))
    return list(answer[: end + 1])


@contextmanager
def answering(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients, its own generation config set aside; all comes back as it was.

    Weights of several types are multiplied as in training (`types_joined`).

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
        with torch.no_grad(), types_joined(model):
            yield
    finally:
        for module in training:
            module.training = True
        for module, config in own:
            module.generation_config = config


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a forward of this process waits for those of the others, which hold the rest of the weights."""
    kinds = (FullyShardedDataParallel, FSDPModule)
    return is_deepspeed_zero3_enabled() or any(isinstance(module, kinds) for module in model.modules())


def whole(model: torch.nn.Module) -> AbstractContextManager:
    """The weights of a model that FSDP 1 has flattened; its `generate` does not reach the wrapper that joins them."""
    is_flat = isinstance(model, FullyShardedDataParallel)
    return FullyShardedDataParallel.summon_full_params(model) if is_flat else nullcontext()


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
