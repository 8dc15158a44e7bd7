"""A chat template by name, file or text, put on a tokenizer together with the tokens that it needs."""

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data.layout import Template
from tunesmith.data.template_table import ALIASES, TEMPLATES
from tunesmith.data.tokenize import added_tokens
from tunesmith.errors import TemplateError, UnknownTemplateError
from tunesmith.lookup import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_BOS = "{%- set bos_token = '' %}\n"
LAST_RESORT = "<|endoftext|>"  # stop token of tokenizers that name none


def use_template(tokenizer: "PreTrainedTokenizerBase", chat_template: str) -> "PreTrainedTokenizerBase":
    """A copy of the tokenizer that renders, and is saved, with this template; itself if nothing differs.

    A stop token of the template's own becomes `eos_token`, if the vocabulary has it. A control token that the
    vocabulary has, but only as a word like others, becomes a special token of the same id. One that the vocabulary
    lacks stays text, with a warning; the answer then ends with that text and `eos_token`. A missing `eos_token`
    becomes `<|endoftext|>`; only that may be new to the vocabulary, with a warning, and then needs a row of its own
    (`model.chat_format.grow_embeddings`). A missing `pad_token` becomes `eos_token`.

    Args:
        tokenizer: not changed.
        chat_template: as for `read_template`.

    Raises: as `read_template`.
    """
    text, template = read_template(chat_template), named_template(chat_template)
    changed = copy.deepcopy(tokenizer)
    if template is not None:
        prefix, _ = added_tokens(tokenizer)
        if template.bos_by_habit and tokenizer.bos_token and tokenizer.bos_token_id not in prefix:
            text = NO_BOS + text
        _know_tokens(changed, template, chat_template)
    _complete(changed)
    changed.chat_template = text
    return tokenizer if _state(changed) == _state(tokenizer) else changed


def named_template(name: str) -> Template | None:
    """The entry of `TEMPLATES` with this name or alias, or `None`."""
    return TEMPLATES.get(ALIASES.get(name, name))


def read_template(chat_template: str) -> str:
    """The Jinja text that the option `chat_template` means.

    Args:
        chat_template: Jinja text as it is; a name in `TEMPLATES`, which wins over a file or folder of that name (write
            `./llama3` for those); a Jinja file; or the folder or Hub id of a tokenizer, whose template is taken.

    Raises: TemplateError for anything else, and for a tokenizer without a template.
    """
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    template = named_template(chat_template)
    if template is not None:
        return template.jinja
    path = Path(chat_template)
    is_hub_id = not path.exists() and not path.suffix and chat_template.count("/") == 1
    if path.is_dir() or is_hub_id:
        return template_of(chat_template)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    raise unknown_template(chat_template)


def unknown_template(name: str) -> UnknownTemplateError:
    """The error for something that is neither a template's name nor a file."""
    if "/" in name or "\\" in name or name.endswith((".jinja", ".jinja2", ".j2", ".txt")):
        return UnknownTemplateError(f"chat_template: there is no file {name}, and it is no Jinja text (no '{{{{').")
    return UnknownTemplateError(
        f"chat_template: there is no template {name!r}, and no such file.{did_you_mean(name, [*TEMPLATES, *ALIASES])} "
        "Leave chat_template (template) out, and the model's own tokenizer says how chats are written, as those of "
        f"most chat models do. Known: {', '.join(sorted(TEMPLATES))}."
    )


def template_of(name: str) -> str:
    """The chat template of the tokenizer in a folder, which need hold no model, or on the Hub."""
    from transformers import AutoTokenizer

    try:
        template = AutoTokenizer.from_pretrained(name).chat_template
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise TemplateError(
            f"chat_template: {name} holds no tokenizer that can be loaded ({reason}). Name a template, a Jinja file, "
            "or a tokenizer's folder or Hub id."
        ) from error
    if not isinstance(template, str):
        raise TemplateError(f"chat_template: the tokenizer {name} has no chat template. Name another.")
    return template


def _know_tokens(tokenizer: "PreTrainedTokenizerBase", template: Template, name: str) -> None:
    """Make single tokens of the template's control tokens, as far as the vocabulary has them."""
    from transformers import AddedToken

    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    cut = [token for token in template.tokens if token in vocabulary and not _is_special(added, vocabulary[token])]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in cut], special_tokens=True)
    missing = [token for token in template.tokens if token not in vocabulary]
    if missing:
        warnings.warn(
            f"chat_template: {name} is made for {template.about.rstrip('.')}, and writes {', '.join(missing)}, which "
            "this tokenizer does not have: it spells them out as text, and answers end with that text and "
            f"{tokenizer.eos_token or LAST_RESORT}. Leave chat_template out if the model has a template of its own, "
            "or take one without such tokens (default, alpaca, vicuna).",
            UserWarning,
            stacklevel=3,
        )
    if template.eos is not None and template.eos in vocabulary:
        tokenizer.eos_token = template.eos


def _is_special(added: dict, index: int) -> bool:
    return index in added and added[index].special


def _complete(tokenizer: "PreTrainedTokenizerBase") -> None:
    """A stop token and a padding token where there is none."""
    if tokenizer.eos_token is None:
        if LAST_RESORT not in tokenizer.get_vocab():
            warnings.warn(
                f"the tokenizer has no eos_token, and no {LAST_RESORT}: it is added, and the embeddings need a row "
                "for it. Set eos_token: to a token that the tokenizer has, to do without.",
                UserWarning,
                stacklevel=3,
            )
        tokenizer.add_special_tokens({"eos_token": LAST_RESORT})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _state(tokenizer: "PreTrainedTokenizerBase") -> tuple:
    """What `use_template` may change."""
    special = sorted(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token, special
