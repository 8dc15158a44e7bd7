"""What a dataset's preparation depends on, and rows read as examples."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from tunesmith.data.detect import describe_format, detect_format
from tunesmith.data.encode import Encoding
from tunesmith.data.formats import FORMATS, columns_of
from tunesmith.data.formatting import Formatter
from tunesmith.data.mix import Stop
from tunesmith.data.normalize import Example
from tunesmith.data.pack import TOKEN_COLUMNS, PackingStrategy, length_before_packing
from tunesmith.data.prepare import BATCH_ROWS, normalized
from tunesmith.data.report import Report, place
from tunesmith.data.rows import Row, RowError, without_nulls
from tunesmith.errors import ConfigError, DataError
from tunesmith.lookup import did_you_mean

NOT_PACKED = (
    "Error occurred while packing the dataset. Make sure that your dataset has enough samples to at least yield one "
    "packed sequence."  # TRL v0.13's
)
OF_DATASETS = ("mixture_weights", "mixture_stop", "on_bad_row", "format", "columns", "system_prompt")
EMPTY = ("empty-text",)  # dropped and counted, not an error: a text dataset may hold empty lines


@dataclass(frozen=True)
class Preparation:
    """Everything that the preparation of one dataset depends on."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    train_on: str = "assistant"
    too_long: str = "truncate"
    packing: bool = False
    packing_strategy: PackingStrategy = "bfd"
    text_field: str = "text"
    append_eos: bool = True
    add_special_tokens: bool = True
    batch_size: int | None = BATCH_ROWS
    num_proc: int | None = None
    shuffle: bool = False
    seed: int = 42
    formatting_func: Callable | None = None
    max_source_length: int | None = None
    max_target_length: int | None = None
    label_with: Callable[[list[int]], list[int]] | None = None
    """Ids of a document → its labels, in place of `train_on`: a completion-only collator's."""
    own_collator: bool = False
    """The person's collator makes the batches: rows then have `attention_mask`, and no labels if all is trained."""
    makes_labels: bool | None = None
    """Whether the person's collator makes the labels. `None`: where every token is trained, as in TRL 0.13."""
    keep_columns: bool = False
    """Rows keep the columns of their source beside the tokens, unless they are packed."""
    skip: bool = False
    num_of_sequences: int = 1024
    chars_per_token: float = 3.6
    mixture_weights: Mapping[str, float] | Sequence[float] | None = None
    mixture_stop: Stop = "first"
    on_bad_row: str = "error"
    format: str | None = None
    columns: dict[str, str] | None = None
    system_prompt: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    answers_by: str = ""
    """The option that asks for answers alone, as the person wrote it, if there is one."""
    unweighed: str = ""
    """The argument whose loss or batches know nothing of weights, if there is one."""
    num_ids: int | None = None
    """Embeddings of the model: what ids and labels of token rows are below."""

    @property
    def encoding(self) -> Encoding:
        """How examples become tokens; documents that packing cuts are not cut before."""
        limit = length_before_packing(self.max_length, self.packing_strategy, self.too_long)
        return Encoding(
            train_on=self.train_on,
            too_long=self.too_long,
            max_length=limit if self.packing else self.max_length,
            on_bad_row=self.on_bad_row,
            append_eos=self.append_eos,
            add_special_tokens=self.add_special_tokens,
            label_with=self.label_with,
            chat_template_kwargs=self.chat_template_kwargs,
            max_source_length=self.max_source_length,
            max_target_length=self.max_target_length,
            unweighed=self.unweighed,
        )

    def only_tokens(self) -> "Preparation":
        """The same for rows that go on to be mixed or packed: token rows with nothing beside."""
        return replace(self, own_collator=False, keep_columns=False)


def preparation_of(
    args: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    evaluation: bool = False,
    formatting_func: Callable | None = None,
    label_with: Callable[[list[int]], list[int]] | None = None,
    own_collator: bool = False,
    makes_labels: bool | None = None,
    unweighed: str = "",
    num_ids: int | None = None,
) -> Preparation:
    """The preparation that an `SFTConfig` asks for, of training or evaluation data."""
    kwargs = args.dataset_kwargs or {}
    packing = args.packing if not evaluation or args.eval_packing is None else args.eval_packing
    return Preparation(
        tokenizer=tokenizer,
        max_length=max_length,
        train_on=args.train_on,
        too_long=args.too_long,
        packing=packing,
        packing_strategy=args.packing_strategy,
        text_field=args.dataset_text_field,
        append_eos=bool(kwargs.get("append_concat_token", args.append_eos)),
        add_special_tokens=bool(kwargs.get("add_special_tokens", True)),
        batch_size=args.dataset_batch_size,
        num_proc=args.dataset_num_proc,
        shuffle=args.shuffle_dataset and not evaluation,
        seed=args.seed if args.data_seed is None else args.data_seed,
        formatting_func=formatting_func,
        label_with=label_with,
        max_source_length=args.max_source_length,
        max_target_length=args.max_target_length,
        own_collator=own_collator,
        makes_labels=makes_labels,
        unweighed=unweighed,
        num_ids=num_ids,
        answers_by=answers_by(args),
        keep_columns=args.remove_unused_columns is False,
        skip=bool(kwargs.get("skip_prepare_dataset", False)),
        num_of_sequences=args.num_of_sequences,
        chars_per_token=args.chars_per_token,
        chat_template_kwargs=args.chat_template_kwargs,
        **{key: kwargs[key] for key in OF_DATASETS if key in kwargs},
    )


def answers_by(args: Any) -> str:
    """The option that asks for answers alone, where one was given a value that says so."""
    for name in ("assistant_only_loss", "completion_only_loss"):
        if getattr(args, name):
            return f"{name}=True"
    return f"train_on={args.train_on!r}" if args.train_on in ("completion", "last_turn") else ""


def check_answers(how: Preparation, where: str, what: str) -> None:
    """Raise ConfigError for rows without answers where an option asks for them: every token would be trained."""
    if how.answers_by and how.label_with is None and not how.own_collator:
        raise ConfigError(
            f"{where}: {how.answers_by} trains answers alone, and {what}. Give conversations, or prompts with "
            "completions, or leave the option out and train every token."
        )


def beside(columns: Iterable[str], how: Preparation) -> list[str]:
    """Columns of a rendered row that may stand beside its tokens: no `weights` of other kinds, which ours read."""
    return [name for name in columns if how.own_collator or name not in (*TOKEN_COLUMNS, "seq_lengths")]


def check_report(name: str, report: Report, packing: bool) -> None:
    """Stop before training on nothing.

    Raises: DataError that says what became of the rows of dataset `name`.
    """
    try:
        report.check(1.0, "evaluate" if name.startswith("eval_dataset") else "train on")
    except DataError as error:
        not_packed = f"{NOT_PACKED} Here " if packing and not report.kept else ""
        raise DataError(f"{name}: {not_packed}{error}") from None


# Rows to be rendered -----------------------------------------------------------------------------------------------


class Reader:
    """Rows of one dataset → Examples. Format and kind of formatting function are found at the first rows."""

    def __init__(self, how: Preparation):
        self.how = how
        self.formatter = Formatter(how.formatting_func) if how.formatting_func is not None else None
        self.format: str | None = None
        self.columns = how.columns

    @property
    def trains_all(self) -> bool:
        """Whether every token of every row is trained, but for BOS, as far as the person's collator should know."""
        if self.how.makes_labels is not None:
            return self.how.makes_labels
        return self.how.label_with is None and (self.format == "text" or self.how.train_on == "all")

    def __call__(self, rows: Sequence[Row], report: Report) -> list[Example]:
        """The rows as Examples; those that cannot be used raise, or are counted in the report.

        Raises: DataError for rows of no known format; RowError for a row that does not fit.
        """
        if self.formatter is not None:
            rows = self._formatted(rows, report)
        if rows and self.format is None:
            self._settle(rows)
            report.note(describe_format(self.format, rows[0], self.columns))
        return normalized(
            rows,
            report,
            format=self.format or "text",
            columns=self.columns,
            system_prompt=self.how.system_prompt,
            on_bad_row=self.how.on_bad_row,
            always_dropped=EMPTY,
        )

    def _formatted(self, rows: Sequence[Row], report: Report) -> list[Row]:
        def on_error(row: Row, error: RowError) -> None:
            report.dropped(error.reason, row, str(error))

        return self.formatter(rows, on_error if self.how.on_bad_row != "error" else None)

    def _settle(self, rows: Sequence[Row]) -> None:
        """Find the format. What a formatting function returns needs no columns named; a named text column wins."""
        field = self.how.text_field
        if self.formatter is not None:
            self.columns = None
            self.format = detect_format(rows)
        elif self.how.format is None and self.columns is None and (named := format_with(field, rows)) is not None:
            self.format = named
        elif self.how.format is None and self.columns is None and field != "text":
            first = rows[0]
            if field not in first.value:
                hint = did_you_mean(field, map(str, first.value))
                raise DataError(
                    f"{place(first.source, first.line)}: dataset_text_field names the column '{field}', but the row "
                    f"has {columns_of(first.value)}.{hint} Name the column that holds the text, or leave it out."
                )
            self.columns, self.format = {"text": field}, "text"
        else:
            self.format = self.how.format or detect_format(rows, self.columns)
        if self.format == "text":
            made = "formatting_func returns plain text" if self.formatter is not None else "the row is plain text"
            check_answers(self.how, place(rows[0].source, rows[0].line), f"{made}, which has none")
        elif self.formatter is None and self.format in FORMATS and rows[0].value.get("text"):
            warnings.warn(
                f"{place(rows[0].source, rows[0].line)}: the rows are read as {self.format}, and their column text is "
                "not. To train on that, set dataset_kwargs={'format': 'text'}; or take the column out.",
                UserWarning,
                stacklevel=2,
            )


def format_with(field: str, rows: Sequence[Row]) -> str | None:
    """The format that the rows have, where the text column that was named is a part of it: then it is no text.

    As in TRL, which knows these two; a column of alpaca's rows is a text like others.
    """
    try:
        found = detect_format(rows)
    except (DataError, ConfigError):
        return None
    return found if found in ("messages", "prompt-completion") and field in FORMATS[found].columns else None


def numbered(name: str, values: Iterable[Mapping[str, Any]], from_table: bool) -> Iterator[Row]:
    """Rows with their numbers, from 1.

    Args:
        from_table: the rows come from a table, which fills in null where a row has no such key.

    Raises: DataError for something that is no row.
    """
    for number, value in enumerate(values, 1):
        if not isinstance(value, Mapping):
            raise DataError(
                f"{name} row {number} is a {type(value).__name__}, not a dict of columns. Texts go into a column: "
                '{"text": "..."}.'
            )
        place = (value.get("source"), value.get("line"))  # of an example that was read from a file
        is_place = isinstance(place[0], str) and isinstance(place[1], int)
        yield Row(without_nulls(dict(value)) if from_table else dict(value), *(place if is_place else (name, number)))


def values_of(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """The rows as plain values; a transform of the person's is applied, a format for tensors is not."""
    if not isinstance(dataset, datasets.Dataset):
        return (dataset[index] for index in range(len(dataset)))
    if dataset.format["type"] == "custom" or not dataset.column_names:
        return iter(dataset)
    batches = dataset.with_format(None).iter(100)  # a row at a time takes seven times as long
    return (dict(zip(batch, values)) for batch in batches for values in zip(*batch.values()))
