"""Token ids and the text before answers → labels that cover the answers only, as batches in the manner of TRL 0.13.

    ### Human: Hi### Assistant: Hello.### Human: Bye### Assistant: So long.
    -------------------------->[ Hello.]--------------------------->[ So long.]

A template is looked for in the text that the ids write, not among the ids: tokenizers write the same text with other
ids where other text stands before it. A token that holds any part of a template is never trained.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from tunesmith.data import IGNORE_INDEX
from tunesmith.errors import ConfigError, DataError
from tunesmith.lookup import did_you_mean
from tunesmith.train.collate import FlatCollator
from tunesmith.train.ready import as_list, labels_of
from tunesmith.train.token_text import RowText, TokenText

OnMissing = Literal["error", "warn", "skip"]
Template = str | list[int]
PASSED_ON = ("tokenizer", "pad_to_multiple_of", "return_tensors")
ONLY_TORCH = 'return_tensors: this collator makes torch tensors only. Leave it out, or give "pt".'


class TemplateNotFound(DataError, RuntimeError):
    """A row holds no response template, or no instruction template, so nothing of it can be trained.

    `kind` is "response" or "instruction"; `as_warning` is what TRL 0.13 said when it masked the row and went on.
    """

    def __init__(self, message: str, kind: str = "response", as_warning: str = ""):
        super().__init__(message)
        self.kind, self.as_warning = kind, as_warning


class Mark(NamedTuple):
    """Tokens `first` up to `stop` hold one occurrence of a template."""

    first: int
    stop: int
    kind: str


class CompletionLabels:
    """Labels of one document.

    Args:
        tokenizer: the ids' tokenizer; read, not changed.
        response_template: what stands before each answer, as text, or as ids that are looked for as they are.
        instruction_template: what stands before each turn of a person; `None`: only the last answer is trained.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        response_template: Template,
        instruction_template: Template | None = None,
    ):
        self.reader = TokenText(tokenizer)
        self.templates = {"response": _checked("response", response_template)}
        if instruction_template is not None:
            self.templates["instruction"] = _checked("instruction", instruction_template)

    def __call__(self, ids: Sequence[int]) -> list[int]:
        """The id where a token is trained, IGNORE_INDEX elsewhere; not shifted.

        Without an instruction template: all behind the last response template. With one: from each response template
        to the next template. TRL paired the k-th instruction with the k-th response instead; where they do not take
        turns that masked answers after two instructions, and trained the header of an answer after an answer.

        Raises: TemplateNotFound.
        """
        row = self.reader.read(as_list(ids, "input_ids"))
        marks = _outermost([mark for kind in self.templates for mark in self._marks(kind, row)])
        for kind in self.templates:
            if not any(mark.kind == kind for mark in marks):
                raise self._not_found(kind, row)
        if "instruction" not in self.templates:
            marks = marks[-1:]
        labels = [IGNORE_INDEX] * len(row.ids)
        for mark, following in pairwise([*marks, Mark(len(row.ids), len(row.ids), "end")]):
            if mark.kind == "response":
                labels[mark.stop : following.first] = row.ids[mark.stop : following.first]
        return labels

    def _marks(self, kind: str, row: RowText) -> list[Mark]:
        template, ids = self.templates[kind], row.ids
        if isinstance(template, str):
            found = row.find(template)
        else:
            size = len(template)
            found = [(i, i + size) for i in range(len(ids) - size + 1) if ids[i : i + size] == template]
        return [Mark(first, stop, kind) for first, stop in found]

    def _not_found(self, kind: str, row: RowText) -> TemplateNotFound:
        template = self.templates[kind]
        encode = self.reader.tokenizer.encode
        key = encode(template, add_special_tokens=False) if isinstance(template, str) else template
        text = row.text if len(row.text) <= 240 else f"{row.text[:120]} ... {row.text[-120:]}"
        ids = ", ".join(map(str, row.ids[:8])) + (", ..." if len(row.ids) > 8 else "")
        return TemplateNotFound(
            f"Could not find {kind} key {key} in token IDs tensor([{ids}]): {kind}_template {template!r} does not "
            f"occur in a row of {len(row.ids)} tokens: {text!r}. If max_length cut it off, raise max_length or drop "
            "long rows (too_long: drop). Otherwise write the template as it stands in the text. "
            "on_missing_template='skip' leaves such rows out of the loss.",
            kind,
            f"Could not find {kind} key `{template}` in the following instance: {text} This instance will be ignored "
            "in loss calculation. Note, if this happens often, consider increasing the `max_seq_length` (`max_length` "
            "here).",
        )


def _checked(kind: str, template: Any) -> Template:
    ids = template.tolist() if hasattr(template, "tolist") else template
    if ids and isinstance(ids, str):
        return ids
    if ids and isinstance(ids, list | tuple) and all(isinstance(one, int) for one in ids):
        return list(ids)
    raise ConfigError(f"{kind}_template: expected a text or a list of token ids, not empty; got {template!r}.")


def _outermost(marks: list[Mark]) -> list[Mark]:
    """In order, without those that lie inside a longer one: `<|im_start|>` in `<|im_start|>assistant` is none."""
    kept: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.first, -mark.stop, mark.kind)):
        if not kept or mark.stop > kept[-1].stop or mark[:2] == kept[-1][:2]:
            kept.append(mark)
    return kept


class LabelsForReport:
    """Labels for rows whose drops are reported one by one: a missing template warns at the first row only."""

    def __init__(self, collator: "DataCollatorForCompletionOnlyLM"):
        self.collator, self.warned = collator, False

    def __call__(self, ids: list[int]) -> list[int]:
        """Labels of one document; all masked where its template is missing."""
        return self.collator.labels_or_masked(ids, self._warn)

    def _warn(self, text: str) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(text, UserWarning, stacklevel=4)


class DataCollatorForCompletionOnlyLM(DataCollatorForLanguageModeling):
    """Pad rows to one length, with labels at the answers only. TRL had this class until 0.19.

    Args:
        response_template: what stands before each answer, as text, or as ids that are looked for as they are.
        instruction_template: what stands before each turn of a person; `None`: a row has one answer, behind the last
            response template.
        args: the tokenizer, if not given by name.
        mlm: there for old scripts; only `False`.
        ignore_index: label of what is not trained, in batches; `labels_for` says IGNORE_INDEX.
        padding_free: lay rows end to end instead of padding them.
        on_missing_template: a row without a template is an "error" (TemplateNotFound), or it is masked, with a
            warning as in TRL 0.13 ("warn") or without ("skip").
        kwargs: `tokenizer`; `pad_to_multiple_of`; `return_tensors`, only "pt".

    Padding is told by its position, never by its id: a padding token that is also the end-of-sequence token does no
    harm, and the real one behind an answer is trained. Labels that rows have are replaced, and columns other than
    `input_ids`, `attention_mask` and `seq_lengths` left out. Rows with `seq_lengths` are packed: each of their
    documents is labelled by itself, and the batch is `FlatCollator`'s.
    """

    def __init__(
        self,
        response_template: Template,
        instruction_template: Template | None = None,
        *args: Any,
        mlm: bool = False,
        ignore_index: int = IGNORE_INDEX,
        padding_free: bool = False,
        on_missing_template: OnMissing = "warn",
        **kwargs: Any,
    ):
        _check_options(mlm, padding_free, on_missing_template, kwargs)
        super().__init__(*args, mlm=False, **kwargs)
        self.response_template = response_template
        self.instruction_template = instruction_template
        self.ignore_index = ignore_index
        self.padding_free = padding_free
        self.on_missing_template = on_missing_template
        self.completion_labels = CompletionLabels(self.tokenizer, response_template, instruction_template)
        if instruction_template is not None:
            _warn_of_shared_padding(self.tokenizer)

    def labels_for(self, input_ids: Sequence[int]) -> list[int]:
        """Labels of one document without padding: the id where a token is trained, IGNORE_INDEX elsewhere.

        Raises: TemplateNotFound, whatever `on_missing_template` says.
        """
        return self.completion_labels(input_ids)

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """A batch of rows: mappings with `input_ids`, or lists of ids."""
        rows = [self._labelled(example) for example in examples]
        if any("seq_lengths" in row for row in rows):
            batch = FlatCollator()(rows)
        elif self.padding_free:
            flat = FlatCollator()([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
            batch = {key: flat[key] for key in ("input_ids", "labels", "position_ids")}
        else:
            batch = self._padded(rows)
        batch["labels"][batch["labels"] == IGNORE_INDEX] = self.ignore_index
        return batch

    def numpy_call(self, examples: list[Any]) -> NoReturn:
        """Not offered."""
        raise ConfigError(ONLY_TORCH)

    def _labelled(self, example: Any) -> dict[str, list[int]]:
        """One row without its padding: `input_ids`, `labels`, and the `attention_mask` that says where padding was."""
        example = example if isinstance(example, Mapping) else {"input_ids": example}
        given = {
            column: as_list(example[column], column)
            for column in ("input_ids", "attention_mask", "seq_lengths")
            if example.get(column) is not None
        }
        _check_row(example, given)
        mask = given.setdefault("attention_mask", [1] * len(given["input_ids"]))
        ids = [one for one, is_real in zip(given["input_ids"], mask) if is_real]
        given["input_ids"] = ids
        return {**given, "labels": labels_of(given, self.labels_or_masked)}

    def labels_or_masked(self, ids: list[int], warn: Callable[[str], None] = warnings.warn) -> list[int]:
        """As `labels_for`, but a missing template is an error, a warning or nothing, as `on_missing_template` says."""
        try:
            return self.labels_for(ids)
        except TemplateNotFound as missing:
            if self.on_missing_template == "error":
                raise
            if self.on_missing_template == "warn":
                warn(missing.as_warning)
            return [IGNORE_INDEX] * len(ids)

    def _padded(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Rows of one width, (B, S); padding that a row brought stays where it was."""
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(len(row["attention_mask"]) for row in rows) // multiple) * multiple
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for line, row in zip(mask, rows):
            given = torch.tensor(row["attention_mask"], dtype=torch.int64).ne(0).long()
            start = width - len(given) if self.tokenizer.padding_side == "left" else 0
            line[start : start + len(given)] = given

        def spread(key: str, fill: int) -> Tensor:
            values = torch.full_like(mask, fill)
            values[mask.bool()] = torch.tensor([value for row in rows for value in row[key]], dtype=torch.int64)
            return values

        pads = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)  # which one does not matter to the model
        return {
            "input_ids": spread("input_ids", next(one for one in pads if one is not None)),
            "attention_mask": mask,
            "labels": spread("labels", IGNORE_INDEX),
        }


def _check_options(mlm: bool, padding_free: bool, on_missing_template: str, options: dict[str, Any]) -> None:
    """No option is taken that would have no effect."""
    if mlm:
        raise ConfigError(
            "mlm: completions are for causal language models; mlm=True had no effect in TRL. Leave it out."
        )
    for name in options.keys() - set(PASSED_ON):
        known = ("ignore_index", "padding_free", "on_missing_template", *PASSED_ON)
        raise ConfigError(
            f"{name}: no option of DataCollatorForCompletionOnlyLM, or one without effect on it."
            f"{did_you_mean(name, known)} Known: {', '.join(known)}."
        )
    if on_missing_template not in get_args(OnMissing):
        raise ConfigError(
            f"on_missing_template: expected one of {', '.join(get_args(OnMissing))}; got {on_missing_template!r}."
        )
    if options.get("return_tensors", "pt") != "pt":
        raise ConfigError(ONLY_TORCH)
    if padding_free and options.get("pad_to_multiple_of"):
        raise ConfigError("pad_to_multiple_of: padding_free=True pads nothing. Leave out one of them.")


def _warn_of_shared_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    warnings.warn(
        f"pad_token_id and eos_token_id are both {tokenizer.pad_token_id}. This collator ignores padding by its "
        "position, so the end-of-sequence token stays trained. A tool that ignores padding by its id would hide it, "
        "and the model would not learn to stop: give such a tool a tokenizer with a padding token of its own.",
        UserWarning,
        stacklevel=3,
    )


def _check_row(example: Mapping, given: dict[str, list[int]]) -> None:
    if "input_ids" not in given:
        raise DataError(f"a row has no 'input_ids', only {sorted(example)}. Tokenize it first.")
    num_ids = len(given["input_ids"])
    mask = given.get("attention_mask", [1] * num_ids)
    if len(mask) != num_ids:
        raise DataError(
            f"a row has {num_ids} input_ids, but an attention_mask of {len(mask)}. Make them equally long."
        )
    num_real, lengths = sum(map(bool, mask)), given.get("seq_lengths")
    if lengths is not None and sum(lengths) != num_real:
        raise DataError(f"a row's seq_lengths {lengths} do not add up to its {num_real} tokens.")
    if example.get("weights") is not None:
        raise DataError(
            "a row has 'weights', which these batches cannot hold. Give this collator to SFTTrainer instead."
        )
