"""Every option of tunesmith, declared once: name, type, range, default, and the text that help and docs show.

One name is the Python keyword, the recipe key and the flag. Field names are unique across the classes. `SFTConfig`
(train/sft.py) joins `TrainingFields` with transformers' `Seq2SeqTrainingArguments`, whose options all work too.
Nothing here imports torch: `tunesmith --help` reads it.
"""

import ast
import inspect
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

TrainOn = Literal["assistant", "completion", "last_turn", "all"]
TooLong = Literal["error", "drop", "truncate", "keep_last_turns"]


@dataclass
class RunConfig:
    """What the run does around the training itself."""

    stage: Literal["sft"] = "sft"
    """What is trained: `sft` learns to answer from examples."""
    overwrite_output_dir: bool = False
    """Replace the run that `output_dir` holds. Without it, a folder that is not empty is an error."""
    plot_loss: bool = True
    """Draw `training_loss.png` when training ends."""
    compare_rows: Annotated[int, Ge(0)] = 0
    """Held-out rows answered before and after training, shown side by side with `compare_metric`. 0: none."""
    compare_metric: str = "exact_match"
    """Name in `METRICS` or `file.py:function`, computed over the compared rows before and after training."""
    sample_rows: Annotated[int, Ge(0)] = 0
    """Held-out rows answered at every evaluation, into `samples.jsonl`. 0: none."""
    do_merge: bool = False
    """After LoRA training, also write the adapter merged into the base model to `output_dir/merged`."""


@dataclass
class ModelConfig:
    """The base model and what of it is trained."""

    model_name_or_path: str | None = None
    """Hub id or folder of the base model, or of an adapter (its base is then read from it)."""
    model_revision: str = "main"
    """Branch, tag or commit of a Hub model."""
    gguf_file: str | None = None
    """GGUF file inside the model folder or repository; its weights are converted to full precision (extra `gguf`)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only from the command line or Python, never from a recipe."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory. `auto`: float32 for what is trained and on CPUs; a frozen base on a GPU keeps
    the checkpoint's own half precision."""
    attn_implementation: str | None = None
    """transformers' attention, used where tunesmith's own does not apply. `None`: the model's default."""
    adapter: str = "lora"
    """Name in `ADAPTERS` (`lora`, `full`, `freeze`) or `file.py:function`."""
    lora_r: Annotated[int, Ge(1)] = 16
    """Rank r of the LoRA update ΔW = (alpha / r) · B · A."""
    lora_alpha: Annotated[int, Ge(1)] = 32
    """LoRA scale; the update is multiplied by alpha / r."""
    lora_dropout: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of a LoRA layer's inputs zeroed during training."""
    lora_target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: names, or `all-linear` for every linear layer but the head."""
    lora_modules_to_save: list[str] | None = None
    """Modules trained whole beside the adapters and saved with them, e.g. `[embed_tokens, lm_head]`."""
    use_rslora: bool = False
    """Scale the update by alpha / √r (rank-stabilised LoRA, arXiv:2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA, arXiv:2402.09353)."""
    freeze_trainable_layers: int = 2
    """With `adapter: freeze`: layers that train; n > 0 the last n, n < 0 the first n."""
    freeze_trainable_modules: list[str] | None = None
    """With `adapter: freeze`: parts of those layers that train, e.g. `[mlp]`. `None`: all parts."""


@dataclass
class DataConfig:
    """Where the examples come from and how they are read."""

    dataset: str | list[str] | None = None
    """Files (json, jsonl, csv, parquet, txt), folders of them, or Hub ids; several are joined."""
    eval_dataset: str | list[str] | None = None
    """Held-out examples, as in `dataset`. `None`: `val_size` decides."""
    split: str = "train"
    """Split of a Hub dataset."""
    format: str | None = None
    """Name in `FORMATS` (alpaca, sharegpt, messages, prompt-completion, text) or `file.py:function`. `None`: detected
    from the columns and said aloud."""
    columns: dict[str, str] | None = None
    """Renames columns before the format reads them: `{instruction: question, output: answer}`."""
    system_prompt: str | None = None
    """System message for every conversation that has none."""
    val_size: Annotated[float, Ge(0)] = 0.0
    """Examples held out of `dataset` for evaluation: a share below 1, a count from 1 on."""
    max_samples: Annotated[int, Ge(1)] | None = None
    """At most this many rows from each file or dataset. `None`: all."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be read or understood stops the run, or is skipped and counted."""
    max_drop_ratio: Annotated[float, Ge(0), Le(1)] = 0.05
    """Stop before training when more than this share of the rows would be dropped."""


@dataclass
class TrainingFields:
    """tunesmith's own training options; `SFTConfig` adds them to those of `Seq2SeqTrainingArguments`."""

    output_dir: str | None = "tmp_trainer"
    """Run directory: recipe, logs, checkpoints, curves, reports and the trained model."""
    learning_rate: Annotated[float, Gt(0)] = 2e-5
    """Peak learning rate of AdamW. LoRA likes about ten times what full training likes."""
    max_length: Annotated[int, Ge(2)] | None = 1024
    """Longest example, in tokens. `None`: what the model was built for."""
    too_long: TooLong = "drop"
    """A longer example: stops the run, is dropped and counted, is cut on the right, or loses its oldest turns."""
    train_on: TrainOn = "assistant"
    """Tokens the loss covers: every assistant turn; the completion after the prompt; the last assistant turn; all."""
    chat_template: str | None = None
    """Jinja file, or Jinja text, used in place of the tokenizer's own chat template and saved with the model."""
    dataset_text_field: str = "text"
    """Column that holds the text of plain-text rows."""
    packing: bool = False
    """Join examples into rows of at most `max_length` tokens. They never see each other, so the loss is the same."""
    packing_strategy: Literal["bfd", "wrapped"] = "bfd"
    """`bfd` keeps examples whole (best-fit decreasing); `wrapped` cuts them to fill every row."""
    eval_packing: bool | None = None
    """Pack the evaluation set. `None`: as `packing`."""
    tokens_per_batch: Annotated[int, Ge(1)] | None = None
    """Token budget of a micro-batch: as many examples as fit, in place of `per_device_train_batch_size` rows."""
    padding_free: bool | None = None
    """Lay examples end to end with no padding and attend within each. `None`: wherever a start-up check shows that
    the model keeps them apart."""
    bf16: bool | None = None
    """Multiply in bfloat16; weights stay as they are. `None`: where a start-up probe finds it faster."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass to save memory. `None`: only where they would not fit."""
    upcast_trainable: bool = True
    """Hold trained weights in float32 even if loaded in half precision, which rounds small updates away."""
    logging_steps: float = 1
    """Steps between two log lines; below 1, a share of the run."""
    logging_nan_inf_filter: bool = False
    """transformers' filter that hides NaN losses from the log and makes every micro-batch wait for the device."""
    report_to: str | list[str] | None = "none"
    """Trackers of transformers (`wandb`, `tensorboard`, ...). The run directory has every figure without one."""
    remove_unused_columns: bool | None = True
    """Drop columns that the model does not read; set it to false for a collator that reads raw columns."""


@dataclass
class DecodingConfig:
    """How answers are generated."""

    max_new_tokens: Annotated[int, Ge(1)] = 256
    """Longest answer, in tokens."""
    do_sample: bool = False
    """Draw from the distribution in place of taking the likeliest token."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Divides the logits before sampling; lower is more certain."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Sample from the likeliest tokens that hold this share of the probability."""
    top_k: Annotated[int, Ge(0)] = 0
    """Sample from the k likeliest tokens. 0: no limit."""
    num_beams: Annotated[int, Ge(1)] = 1
    """Beams of beam search. 1: none."""
    repetition_penalty: Annotated[float, Gt(0)] = 1.0
    """Divides the logits of tokens already written. 1: none."""
    generation_batch_size: Annotated[int, Ge(1)] = 16
    """Prompts answered at once."""


CONFIGS: tuple[type, ...] = (RunConfig, ModelConfig, DataConfig, TrainingFields, DecodingConfig)

# Spellings of other programs and other years; giving both with different values is an error.
ALIASES: dict[str, str] = {
    "model": "model_name_or_path",
    "torch_dtype": "dtype",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "finetuning_type": "adapter",
    "flash_attn": "attn_implementation",
    "evaluation_strategy": "eval_strategy",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Field name → the text under it, for a dataclass and its bases, as `--help` and the docs show it."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__ == "builtins":
            continue
        try:
            tree = ast.parse(inspect.cleandoc(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body
        for statement, following in pairwise(body):
            named = isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr)
            if named and isinstance(following.value, ast.Constant) and isinstance(following.value.value, str):
                docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


@dataclass
class Recipe:
    """A parsed recipe: one object per concern, and where every given key was found."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    training: dict[str, Any]
    """Keyword arguments of `SFTConfig`: tunesmith's and transformers' training options that were given."""
    decoding: DecodingConfig
    given: dict[str, str] = field(default_factory=dict, compare=False)
    """Key → `recipe.yaml:7` or `--key`, for messages. Two recipes are equal wherever their values were found."""
