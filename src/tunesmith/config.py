"""Every option of tunesmith, declared once: name, type, range, default, and the text that help and docs show.

One name is the Python keyword, the recipe key and the flag, unique across the recipe's classes. `SFTConfig`
(train/options.py) joins `TrainingFields` with transformers' `Seq2SeqTrainingArguments`, whose options all work too.
Nothing here imports torch: `tunesmith --help` reads it.
"""

import ast
import copy
import inspect
import re
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import pairwise
from types import MappingProxyType
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from tunesmith.errors import ConfigError

TrainOn = Literal["assistant", "completion", "last_turn", "all"]
TooLong = Literal["error", "drop", "truncate", "truncate_left", "keep_last_turns"]
MixStrategy = Literal["concat", "interleave_under", "interleave_over"]


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


def described(cls: type) -> type:
    """Prepare a dataclass for `HfArgumentParser`, which reads the fields' metadata; a class decorator.

    The text under each field becomes its help, percent signs are doubled where argparse would format them, and a
    switch that may be `None` can stand alone (`--bf16`). Fields of base classes are copied, not changed.
    """
    docs = field_docs(cls)
    for declared in fields(cls):
        help_text = declared.metadata.get("help") or docs.get(declared.name, "")
        found = {"help": re.sub(r"%%|%(?!\()", "%%", help_text)}
        if declared.type == bool | None and declared.default is None:
            found |= {"nargs": "?", "const": True}
        own = cls.__dataclass_fields__[declared.name] = copy.copy(declared)
        own.metadata = MappingProxyType({**declared.metadata, **found})
    return cls


@dataclass
class RewardFields:
    """What a recipe of stage rm and `RewardConfig` say alike."""

    reward_loss: Literal["last_token", "span"] = "last_token"
    """Rewards that the loss of stage rm compares: `last_token` those that become the scores; `span` those of all
    positions from where two answers begin to differ, as LLaMA-Efficient-Tuning did."""


@dataclass
class RunConfig(RewardFields):
    """What the run does around the training itself."""

    stage: Literal["pt", "sft", "rm"] = "sft"
    """What is trained: `pt` learns plain text, `sft` to answer from examples, `rm` to prefer the better of two answers
    (a reward model)."""
    overwrite_output_dir: bool = False
    """Replace the run that `output_dir` holds. Without it a run that was cut short goes on from its last checkpoint,
    and any other folder that is not empty is an error."""
    plot_loss: bool = True
    """Draw `training_loss.png` when training ends, and `training_eval_loss.png` where there were evaluations."""
    compare_rows: Annotated[int, Ge(0)] = 0
    """Held-out rows answered before and after training, shown side by side with `metrics`. 0: none."""
    metrics: str | list[str] | None = None
    """Names in `METRICS` or `file.py:function`, several as a list or comma-separated, computed over written answers.
    `None`: `exact_match` for compared rows, BLEU-4 and ROUGE (`bleu_rouge`) with `predict_with_generate`."""
    sample_rows: Annotated[int, Ge(0)] = 0
    """Held-out rows answered at every evaluation, into `samples.jsonl`. 0: none."""
    do_merge: bool = False
    """After LoRA training, also write the adapter merged into the base model to `output_dir/merged`."""


@dataclass
class BaseModelFields:
    """What both doors say about the base model and its adapter."""

    model_name_or_path: str | None = None
    """Hub id or folder of the base model, or of an adapter (its base is then read from it)."""
    model_revision: str = "main"
    """Branch, tag or commit of a Hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only from the command line or Python, never from a recipe."""
    attn_implementation: str | None = None
    """transformers' attention, used where tunesmith's own does not apply. `None`: the model's default."""
    load_in_8bit: bool = False
    """Hold the frozen base in 8 bits (bitsandbytes, extra `quant`); only an adapter trains then."""
    load_in_4bit: bool = False
    """Hold the frozen base in 4 bits (QLoRA, arXiv:2305.14314; extra `quant`); only an adapter trains then."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Grid of 4-bit values: `nf4` for normally distributed weights, or `fp4`."""
    use_bnb_nested_quant: bool = False
    """Quantize the scales of 4-bit blocks too, which saves another 0.4 bits per weight."""
    lora_r: Annotated[int, Ge(1)] = 16
    """Rank r of the LoRA update ΔW = (alpha / r) · B · A."""
    lora_alpha: Annotated[int, Ge(1)] = 32
    """LoRA scale; the update is multiplied by alpha / r."""
    lora_dropout: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of a LoRA layer's inputs zeroed during training."""
    lora_target_modules: list[str] | str | None = "all-linear"
    """Modules that get an adapter: names, or `all-linear` for every linear layer but the head."""
    lora_modules_to_save: list[str] | None = None
    """Modules trained whole beside the adapters and saved with them, e.g. `[embed_tokens, lm_head]`."""
    use_rslora: bool = False
    """Scale the update by alpha / √r (rank-stabilised LoRA, arXiv:2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA, arXiv:2402.09353)."""


@dataclass
class ModelFields(BaseModelFields):
    """The base model and what of it is trained."""

    cache_dir: str | None = None
    """Folder for downloaded models. `None`: the Hub's own."""
    hf_token: str | None = field(default=None, repr=False)
    """Access token for gated models; never written to a file. `None`: that of `hf auth login`, or `HF_TOKEN`."""
    use_fast_tokenizer: bool = True
    """Kept for older recipes: transformers 5 takes the tokenizer written in Rust wherever there is one, and false is
    said aloud."""
    checkpoint_dir: str | list[str] | None = None
    """Where training starts in place of the base's weights: adapter folders, comma-separated, for `lora`; one folder
    of whole weights for `full` and `freeze`."""
    resume_lora_training: bool = True
    """The last adapter of `checkpoint_dir` goes on training. Otherwise all are merged and a new one begins."""
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = None
    """Stretch the positions of a model to texts longer than it was made for: linear (arXiv:2306.15595), dynamic,
    yarn (arXiv:2309.00071) or llama3. A model that is scaled already stays as it is; `dynamic` makes the texts of a
    batch depend on each other."""
    rope_factor: Annotated[float, Ge(1)] | None = None
    """How far `rope_scaling` stretches. `None`: to `max_length` in training; 2 for a model that only answers."""
    upcast_layernorm: bool = False
    """Hold the norm weights of a frozen half-precision base in float32."""
    gguf_file: str | None = None
    """GGUF file inside the model folder or repository; its weights are converted to full precision (extra `gguf`)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory. `auto`: float32 for what is trained and on CPUs; a frozen base on a GPU keeps
    the checkpoint's own half precision."""
    adapter: str = "lora"
    """Name in `ADAPTERS` (`lora`, `full`, `freeze`), or `file.py:function`. `none`: the base as it is, which can only
    be evaluated."""
    lora_init: Literal["default", "pissa", "gaussian", "olora"] = "default"
    """First weights of A and B. `pissa`: the base's principal singular vectors (arXiv:2404.02948), which it then
    lacks; `default`: B is zero."""
    lora_trainable_tokens: list[str] | None = None
    """Tokens whose embedding rows train beside the adapters, e.g. `[<|im_start|>, <|im_end|>]`."""
    freeze_trainable_layers: int = 2
    """With `adapter: freeze`: layers that train; n > 0 the last n, n < 0 the first n."""
    freeze_trainable_modules: list[str] | None = None
    """With `adapter: freeze`: parts of those layers that train, e.g. `[mlp]`, `[self_attn]`; `all`, or `None`: all."""


@dataclass
class DataConfig:
    """Where the examples come from and how they are read."""

    dataset: str | list[str] | None = None
    """Files (json, jsonl, csv, parquet, arrow, txt), folders of them, Hub ids, or names in `dataset_info.json` (which
    win over files); several as a list or comma-separated."""
    dataset_dir: str = "data"
    """Folder of `dataset_info.json`, the registry of named datasets, and of their files."""
    eval_dataset: str | list[str] | None = None
    """Held-out examples, as in `dataset`. `None`: `val_size` decides."""
    eval_on_each_dataset: bool = False
    """Evaluate each of several sets by itself: `eval_<name>_loss`, ..."""
    split: str = "train"
    """Split of a Hub dataset."""
    mix_strategy: MixStrategy = "concat"
    """Several datasets: one after another; drawn in turn until the first ends (`interleave_under`, no row twice);
    drawn until all have ended (`interleave_over`, rows of the short ones repeat)."""
    interleave_probs: list[float] | str | None = None
    """Share of each dataset in an interleaving, as a list or `0.3,0.7`; they add up to 1. `None`: equal shares."""
    streaming: bool = False
    """Read rows as training needs them, for data larger than memory. Needs `max_steps`."""
    buffer_size: Annotated[int, Ge(1)] = 16384
    """Rows of a stream that are shuffled together."""
    format: str | None = None
    """Name in `FORMATS` (alpaca, sharegpt, messages, prompt-completion, text, preference) or `file.py:function`, for
    files and Hub ids. `None`: detected from the columns and said aloud."""
    columns: dict[str, str] | None = None
    """Renames columns before the format reads them: `{instruction: question, output: answer}`. An
    entry of `dataset_info.json` names its own."""
    system_prompt: str | list[str] | None = None
    """System message for every conversation that has none; several, as a list or separated by `|`, are one for each
    dataset."""
    val_size: Annotated[float, Ge(0)] = 0.0
    """Examples held out of `dataset` for evaluation: a share below 1, a count from 1 on. A stream
    takes a count."""
    max_samples: Annotated[int, Ge(1)] | None = None
    """At most this many rows from each file or dataset. `None`: all."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be read or understood stops the run, or is skipped and counted."""
    max_drop_ratio: Annotated[float, Ge(0), Le(1)] = 0.05
    """Stop before training when more than this share of the rows would be dropped."""
    data_cache_dir: str | None = None
    """Folder of tokenized data (sets of 2,000 rows or more), used again while rows, tokenizer, template and options
    are the same. `None`: `$TUNESMITH_CACHE/data`, else the user's cache folder; `off`: none."""
    overwrite_cache: bool = False
    """Tokenize anew where `data_cache_dir` holds the same data."""


@dataclass
class TrainingFields:
    """tunesmith's own training options; `SFTConfig` adds them to those of `Seq2SeqTrainingArguments`."""

    output_dir: str | None = "tmp_trainer"
    """Run directory: recipe, logs, checkpoints, curves, reports and the trained model."""
    learning_rate: Annotated[float, Gt(0)] = 2e-5
    """Peak learning rate of AdamW. LoRA likes about ten times what full training likes."""
    max_length: Annotated[int, Ge(2)] | None = 1024
    """Longest example, in tokens; 1024 is lowered to what the tokenizer was made for. `None`: what the model was."""
    too_long: TooLong = "truncate"
    """A longer example: stops the run, is dropped, is cut on the right or the left, or loses its oldest turns. All but
    the first are counted; a cut leaves no false stop token, and a row that it leaves untrained is dropped."""
    max_source_length: Annotated[int, Ge(1)] | None = None
    """Longest prompt of a turn, in tokens; a longer one is cut at its end, but keeps what the template writes before
    the answer. `None`: only `max_length` counts."""
    max_target_length: Annotated[int, Ge(1)] | None = None
    """Longest answer of a turn, in tokens; the end of a longer one is cut. `None`: only `max_length` counts."""
    train_on: TrainOn = "assistant"
    """Tokens the loss covers: every assistant turn; the completion after the prompt; the last assistant turn; all."""
    chat_template: str | None = None
    """Name in `TEMPLATES` (`chatml`, `llama3`, `alpaca`, ...), Jinja file, Jinja text, or folder of another tokenizer:
    the template in place of the tokenizer's own, saved with the model."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the template, e.g. `{enable_thinking: false}`; a row's own `chat_template_kwargs` win."""
    eos_token: str | None = None
    """Stop token, in place of the tokenizer's; saved with the model."""
    pad_token: str | None = None
    """Padding token, in place of the tokenizer's. Padding is ignored by its place, so it may be the stop token."""
    append_eos: bool = True
    """End each plain text with the stop token, so that the model learns to stop."""
    dataset_text_field: str = "text"
    """Column that holds the text of plain-text rows."""
    dataset_num_proc: Annotated[int, Ge(1)] | None = None
    """Processes that render and tokenize. `None`: two threads of this one; from 50,000 rows and 4 cores on a process
    for each 10,000 rows, at most 8."""
    dataset_batch_size: int | None = 1000
    """Examples rendered and tokenized at once. `None`, or below 1: all."""
    shuffle_dataset: bool = False
    """Shuffle the training rows once, by `seed`, before they are packed."""
    packing: bool = False
    """Join examples into rows of at most `max_length` tokens. They never see each other, so the loss is the same."""
    packing_strategy: Literal["bfd", "bfd_split", "wrapped", "blocks"] = "bfd"
    """`bfd` keeps examples whole (best-fit decreasing); `bfd_split` first cuts longer ones into several; `wrapped`
    cuts to fill every row; `blocks` also leaves out the tail that fills none, as stage `pt` does."""
    eval_packing: bool | None = None
    """Pack the evaluation set. `None`: as `packing`."""
    tokens_per_batch: Annotated[int, Ge(1)] | None = None
    """Token budget of a micro-batch: as many examples as fit, in place of `per_device_train_batch_size` rows."""
    padding_side: Literal["right", "left"] = "right"
    """Where rows are padded that cannot be laid end to end."""
    ignore_pad_token_for_loss: bool = True
    """Leave padding out of the loss. If false, rows are padded and the padding is trained as text is."""
    padding_free: bool | None = None
    """Lay examples end to end with no padding and attend within each. `None`: wherever a start-up check shows that
    the model keeps them apart."""
    share_prefix: bool | None = None
    """Compute once in a micro-batch what all its examples begin with, such as a system prompt; the result is the same.
    `None`: on a CPU, wherever a start-up check shows it and nothing is drawn by chance (dropout, NEFTune)."""
    bf16: bool | None = None
    """Multiply in bfloat16; weights stay as they are. `None`: where a start-up probe finds it faster."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass to save memory. `None`: only where they would not fit."""
    compile_layers: bool | None = None
    """Compile the decoder layers with `torch.compile`, all but their attention. `None`: on a CPU, where there is a C++
    compiler and the run is long enough to repay some ten seconds."""
    upcast_trainable: bool | None = None
    """Hold trained weights in float32 even if loaded in half precision, which rounds small updates away. `None`: yes,
    unless `model_init_kwargs` asked for their type."""
    loss_type: str = "nll"
    """Name in `LOSSES`: `nll`, or `dft`, which weighs each token by its own probability (arXiv:2508.05629)."""
    router_aux_loss_coef: Annotated[float, Ge(0)] | None = None
    """Weight of the load-balancing loss of a mixture of experts. `None`: none is added."""
    token_metrics: bool = True
    """Log `mean_token_accuracy` and `entropy` of the trained tokens, from the pass that forms the loss."""
    loraplus_lr_ratio: Annotated[float, Gt(0)] | None = None
    """Learning rate of LoRA's B matrices as a multiple of A's (LoRA+, arXiv:2402.12354; 16 is usual)."""
    activation_offloading: bool = False
    """Keep activations for the backward pass in host memory. Needs a GPU."""
    resume_allow: list[str] = field(default_factory=list)
    """What may differ from the run that wrote the checkpoint to go on from: `learning_rate`, `schedule`, `length`,
    `optimizer`, `batch`, `loss`, `precision`, `weights`, `processes`, `versions`. Anything else that would train other
    weights is an error."""
    on_save_failure: Literal["stop", "continue"] = "stop"
    """What happens where a checkpoint cannot be written, as on a full disk. Earlier ones stay either way."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens where a loss or gradient is not a number: `stop` before the update, or `skip` the step."""
    max_skipped_steps: Annotated[int, Ge(0)] = 3
    """Steps of a run that `on_nonfinite: skip` may leave out before it stops."""
    hang_timeout: Annotated[float, Ge(0)] = 3600.0
    """Seconds without a finished micro-batch after which the process ends, with the stack of every thread on file.
    0: it may take for ever."""
    logging_steps: float = 1
    """Steps between two log lines; below 1, a share of the run."""
    logging_nan_inf_filter: bool = False
    """transformers' filter that hides NaN losses from the log and makes every micro-batch wait for the device."""
    report_to: None | str | list[str] = "none"  # noqa: RUF036 - HfArgumentParser wants the first two to be these
    """Trackers of transformers (`wandb`, `tensorboard`, ...). The run directory has every figure without one."""
    remove_unused_columns: bool | None = True
    """Drop columns that the model does not read; set it to false for a collator that reads raw columns."""


@described
@dataclass
class ModelConfig(BaseModelFields):
    """TRL's model options, with its defaults; `get_peft_config` and `get_quantization_config` read them.

    Raises: ConfigError for 8 and 4 bits at once, or two types.
    """

    dtype: str | None = None
    """Type of the weights: auto, float32, bfloat16 or float16. `None`: what `from_pretrained` chooses."""
    torch_dtype: str | None = None
    """Older name of `dtype`."""
    use_peft: bool = False
    """Train a LoRA adapter instead of the model's own weights."""
    lora_dropout: Annotated[float, Ge(0), Le(1)] = 0.05
    """Share of a LoRA layer's inputs zeroed during training."""
    lora_target_modules: list[str] | None = None
    """Modules that get an adapter: names, or `all-linear`. `None`: peft's choice for the architecture."""
    lora_target_parameters: list[str] | None = None
    """Parameters that get an adapter where experts are no modules, e.g. `[mlp.experts.down_proj]`."""
    lora_task_type: str = "CAUSAL_LM"
    """peft's task type; `SEQ_CLS` for reward models."""
    bnb_4bit_quant_storage: str | None = None
    """Type that stores 4-bit weights, for FSDP. `None`: as `dtype`, or bytes."""

    def __post_init__(self):
        if self.load_in_8bit and self.load_in_4bit:
            raise ConfigError(
                "load_in_8bit and load_in_4bit: You can't use 8 bit and 4 bit precision at the same time"
            )
        if self.dtype is not None and self.torch_dtype is not None and self.dtype != self.torch_dtype:
            raise ConfigError(
                f"dtype ({self.dtype}) and torch_dtype ({self.torch_dtype}) name one option. Keep dtype."
            )
        self.dtype = self.torch_dtype = self.torch_dtype if self.dtype is None else self.dtype
        if isinstance(self.lora_target_modules, list) and len(self.lora_target_modules) == 1:
            self.lora_target_modules = self.lora_target_modules[0]  # so that the flag can say all-linear


@dataclass
class DecodingConfig:
    """How answers are generated."""

    max_new_tokens: Annotated[int, Ge(1)] | None = None
    """Longest answer, in tokens. `None`: `generation_max_length`, then `max_target_length`, then 256. All
    count new tokens."""
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
    eval_num_beams: Annotated[int, Ge(1)] | None = None
    """Beams of evaluation and prediction. `None`: `generation_num_beams`, then `num_beams`."""
    length_penalty: float = 1.0
    """Above 0 beam search likes long answers, below 0 short ones. Only with beams."""
    repetition_penalty: Annotated[float, Gt(0)] = 1.0
    """Divides the logits of tokens already written. 1: none."""
    generation_batch_size: Annotated[int, Ge(1)] = 16
    """Prompts answered at once."""


CONFIGS: tuple[type, ...] = (RunConfig, ModelFields, DataConfig, TrainingFields, DecodingConfig)

# Spellings of other programs and other years; giving both with different values is an error.
ALIASES: dict[str, str] = {
    "model": "model_name_or_path",
    "compare_metric": "metrics",
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "modules_to_save": "lora_modules_to_save",
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    # LLaMA-Factory and LLaMA-Efficient-Tuning; recipe/llamafactory.py knows the keys that mean something else
    "template": "chat_template",
    "prompt_template": "chat_template",
    "dev_ratio": "val_size",
    "neft_alpha": "neftune_noise_alpha",
    "adapter_name_or_path": "checkpoint_dir",
    "hf_hub_token": "hf_token",
    "hf_auth_token": "hf_token",
    "tokenized_path": "data_cache_dir",
    "cache_path": "data_cache_dir",
    "preprocessing_num_workers": "dataset_num_proc",
    "preprocessing_batch_size": "dataset_batch_size",
    "default_system": "system_prompt",
    "num_layer_trainable": "freeze_trainable_layers",
    "name_module_trainable": "freeze_trainable_modules",
    "additional_target": "lora_modules_to_save",
    "quantization_type": "bnb_4bit_quant_type",
    "double_quantization": "use_bnb_nested_quant",
    "cutoff_len": "max_length",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "finetuning_type": "adapter",
    "flash_attn": "attn_implementation",
    "enable_liger_kernel": "use_liger_kernel",
    "moe_aux_loss_coef": "router_aux_loss_coef",
    # transformers 4
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "torchdynamo": "torch_compile_backend",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    # TRL
    "use_liger": "use_liger_kernel",
    "chat_template_path": "chat_template",
}


@dataclass
class Recipe:
    """A parsed recipe: one object per concern, and where every given key was found."""

    run: RunConfig
    model: ModelFields
    data: DataConfig
    training: dict[str, Any]
    """Keyword arguments of `SFTConfig`: tunesmith's and transformers' training options that were given."""
    decoding: DecodingConfig
    given: dict[str, str] = field(default_factory=dict, compare=False)
    """Key → `recipe.yaml:7` or `--key`, for messages. Two recipes are equal wherever their values were found."""
    notes: list[str] = field(default_factory=list, compare=False)
    """Lines to print before the run: keys of other programs that nothing reads, defaults that differ from theirs."""
