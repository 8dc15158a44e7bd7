"""Keys and words of LLaMA-Factory, and of LLaMA-Efficient-Tuning before it, that are spelled otherwise here.

`KEYS` holds every key of both (September 2023 to version 0.9.5) that is neither an option nor an alias; `WORDS` and
`TOLD_WORDS` hold values that an option of ours knows under another word, or does not have.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from annotated_types import Ge, Lt

from tunesmith.recipe.fates import Fate, as_is, becomes, each, switch, told, unread

# ------------------------------------------------------------------------------------------ what says the same


def in_bits(bits: int) -> dict[str, bool]:
    """The switch for a base in so many bits."""
    if bits not in (4, 8):
        raise ValueError(f"expected 4 or 8, got {bits}. Bases are quantized by bitsandbytes, which has no others.")
    return {f"load_in_{bits}bit": True}


CONVERSIONS: dict[str, Fate] = {
    "quantization_bit": becomes(int | None, in_bits),
    "train_on_prompt": switch({"train_on": "all"}),
    "mask_history": switch({"train_on": "last_turn"}),
    "neat_packing": switch({"packing": True}),
    "sft_packing": switch({"packing": True}),
    "create_new_adapter": switch({"resume_lora_training": False}, off={"resume_lora_training": True}),
    "pissa_init": switch({"lora_init": "pissa"}),
    "use_dft_loss": switch({"loss_type": "dft"}),
    "enable_thinking": becomes(
        bool | None, lambda on: {} if on is None else {"chat_template_kwargs": {"enable_thinking": on}}
    ),
    "disable_gradient_checkpointing": switch({"gradient_checkpointing": False}),
    "disable_shuffling": switch({"train_sampling_strategy": "sequential"}),
    "pure_bf16": switch({"dtype": "bfloat16", "upcast_trainable": False}),
    "warmup_ratio": becomes(
        Annotated[float, Ge(0), Lt(1)] | None, lambda share: {"warmup_steps": share} if share else {}
    ),
    "use_auth_token": becomes(bool | str | None, lambda token: {"hf_token": token} if isinstance(token, str) else {}),
}

# ------------------------------------------------------------------------------------------ what is not here

TEXT_ONLY = "models are trained on text only here. Remove it"
NO_NEW_TOKENS = (
    "the vocabulary is not extended here. Remove it and use tokens that the tokenizer has (lora_trainable_tokens "
    "trains their rows), or add them to a copy of the model first"
)
DERIVED = "These arguments cannot be specified: it follows from the other options. Remove it"
EXPORT = "a recipe does not export. Remove it"
BENCHMARK = (
    "it belongs to LLaMA-Factory's benchmarks, which are not here. Use lm-evaluation-harness on the trained model"
)
ELSEWHERE = "it belongs into the dataset's entry in dataset_info.json. Remove it"

TOLD: dict[str, Fate] = {
    **each("compute_dtype model_max_length device_map", told(DERIVED)),
    "block_diag_attn": told(DERIVED, False),
    "adapter_folder": told("write the folder into checkpoint_dir: checkpoint_dir: ADAPTER/{value}"),
    "freeze_extra_modules": told("with adapter: freeze only layers train. Remove it, or set adapter: full"),
    "preserve_thinking": told(
        "the template decides which thoughts stay. Where it has a variable for it, write chat_template_kwargs", False
    ),
    **each("add_tokens add_special_tokens new_special_tokens new_special_tokens_config", told(NO_NEW_TOKENS)),
    "train_from_scratch": told("training starts from a model's weights here. Save a fresh model and name it", False),
    "shift_attn": told("shifted sparse attention (LongLoRA) is not here. Remove it", False),
    "mixture_of_depths": told("mixture of depths is not here. Remove it"),
    "use_llama_pro": told("LLaMA Pro is not here. Remove it, or use adapter: freeze as it is", False),
    "use_galore": told("write it as transformers does: optim: galore_adamw, optim_target_modules: all-linear", False),
    "use_apollo": told("write it as transformers does: optim: apollo_adamw, optim_target_modules: all-linear", False),
    "use_badam": told("BAdam is not here. Remove it; adapter: freeze or lora saves memory, too", False),
    "use_adam_mini": told("Adam-mini is not here. Remove it, or write optim: adamw_8bit", False),
    "use_muon": told("Muon is not here. Remove it; optim names what there is", False),
    "use_asft_loss": told("the ASFT loss is not here. Write loss_type: dft or nll", False),
    "use_eaft_loss": told("the EAFT loss is not here. Write loss_type: dft or nll", False),
    "use_swanlab": told("write report_to: swanlab", False),
    "use_mca": told("Megatron is not here. Remove it; deepspeed and fsdp are options", False),
    "use_hyper_parallel": told("HyperParallel is not here. Remove it; deepspeed and fsdp are options", False),
    "use_kt": told("KTransformers is not here. Remove it", False),
    "fp8": told("8-bit floats are not trained in here. Remove it; bf16 is chosen where it is the faster", False),
    "early_stopping_steps": told("a run does not stop early. Remove it; load_best_model_at_end keeps the best model"),
    "quantization_method": told("bases are quantized by bitsandbytes. Remove it", "bnb", "bitsandbytes"),
    "quantization_device_map": told("each process holds the base on its own device. Remove it"),
    "infer_dtype": told("write dtype: {value}", "auto"),
    "skip_special_tokens": told("answers are written without control tokens. Remove it", True),
    "visual_inputs": told(TEXT_ONLY, False),
    "train_mm_proj_only": told(TEXT_ONLY, False),
    "freeze_language_model": told(TEXT_ONLY, False),
    "freeze_vision_tower": told(TEXT_ONLY, True),
    "freeze_multi_modal_projector": told(TEXT_ONLY, True),
    "export_dir": told(
        "a recipe does not export. Remove it and merge with: tunesmith merge RUN_OR_ADAPTER {value}; or set "
        "do_merge: true, which merges after training"
    ),
    **each("export_quantization_bit export_quantization_dataset", told(EXPORT)),
    "export_hub_model_id": told("write hub_model_id, with push_to_hub: true"),
    "export_legacy_format": told("weights are always saved as safetensors. Remove it", False),
    **each("task task_dir n_shot lang download_mode", told(BENCHMARK)),
    "batch_size": told("write per_device_train_batch_size or per_device_eval_batch_size"),
    "save_dir": told("write output_dir"),
    **each("formatting ranking subset", told(ELSEWHERE)),
}

# ------------------------------------------------------------------------------------------ what changes nothing

OTHER_STAGES = "it belongs to stage dpo, kto or ppo, which does not exist here; nothing reads it."


def belongs_to(feature: str) -> Fate:
    """A detail of a feature that is not here; the feature's own switch is what would matter."""
    return unread(f"it belongs to {feature}, which is not here; nothing reads it.")


UNREAD: dict[str, Fate] = {
    **each(
        "pref_beta pref_ftx pref_bco_weight pref_loss dpo_beta dpo_ftx dpo_loss dpo_label_smoothing orpo_beta "
        "kto_chosen_weight kto_rejected_weight kto_ftx simpo_gamma ld_alpha ppo_buffer_size ppo_epochs "
        "ppo_score_norm ppo_target ppo_whiten_rewards ppo_logger ref_model ref_model_adapters "
        "ref_model_quantization_bit reward_model reward_model_adapters reward_model_quantization_bit "
        "reward_model_type",
        unread(OTHER_STAGES),
    ),
    **each("module_dropout oft_rank oft_block_size oft_target", belongs_to("OFT")),
    **each(
        "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise",
        belongs_to("use_galore"),
    ),
    **each(
        "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type "
        "apollo_scale_type apollo_layerwise apollo_scale_front",
        belongs_to("use_apollo"),
    ),
    **each(
        "badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_switch_block_every "
        "badam_update_ratio badam_mask_mode badam_verbose",
        belongs_to("use_badam"),
    ),
    **each("asft_alpha eaft_alpha", belongs_to("use_asft_loss and use_eaft_loss")),
    **each(
        "swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir "
        "swanlab_lark_webhook_url swanlab_lark_secret",
        unread("SwanLab takes its settings from the environment (SWANLAB_PROJECT, ...); nothing reads it."),
    ),
    **each("hyper_parallel_args", belongs_to("use_hyper_parallel")),
    **each("fp8_backend fp8_enable_fsdp_float8_all_gather", belongs_to("fp8")),
    **each("init_special_tokens", belongs_to("add_special_tokens")),
    **each(
        "kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num kt_optimize_rule "
        "kt_lora_expert_intermediate_size kt_force_think kt_maxlen kt_mode kt_use_cuda_graph cpu_infer chunk_size "
        "mode",
        belongs_to("use_kt"),
    ),
    **each(
        "image_max_pixels image_min_pixels image_do_pan_and_scan image_resolution crop_to_patches video_max_pixels "
        "video_min_pixels video_resolution video_fps video_maxlen use_audio_in_video audio_sampling_rate media_dir "
        "image_dir",
        unread("models are trained on text only here; nothing reads it."),
    ),
    **each(
        "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen "
        "sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend",
        unread("answers come from transformers here; nothing reads it."),
    ),
    "infer_backend": unread("answers come from transformers here; nothing reads it.", "huggingface", "hf"),
    **each(
        "ray_num_workers ray_init_kwargs ray_run_name ray_storage_path ray_storage_filesystem resources_per_worker "
        "placement_strategy master_addr master_port",
        unread("several processes are started with torchrun, not with Ray; nothing reads it."),
    ),
    **each(
        "profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps profiler_repeat "
        "profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules",
        belongs_to("enable_torch_profiler"),
    ),
    "enable_torch_profiler": unread("nothing is profiled here.", False),
    **each("export_size export_device export_quantization_nsamples export_quantization_maxlen", unread(EXPORT + ".")),
    **each("ms_hub_token om_hub_token", unread("models and data come from the Hugging Face Hub; nothing reads it.")),
    **each(
        "use_unsloth use_unsloth_gc use_v1_kernels", unread("tunesmith has its own kernels; it is not used.", False)
    ),
    "num_hidden_layers": unread("it is read from the model."),
    "resize_vocab": unread("the vocabulary stays as it is; no token is added.", False),
    "tool_format": unread("the chat template writes tools; nothing reads it."),
    "reserved_label_len": unread("lengths are kept by max_target_length and max_length; nothing reads it."),
    "loraplus_lr_embedding": unread("adapters on embeddings learn at learning_rate; nothing reads it."),
    "pissa_iter": unread("PiSSA takes the exact decomposition; nothing reads it.", -1),
    "pissa_convert": unread("the trained adapter is always saved as plain LoRA.", True),
    "low_cpu_mem_usage": unread("weights are always loaded so.", True),
    "offload_folder": unread("no weights are put on disk; nothing reads it."),
    "use_kv_cache": unread("answers are always written with a cache.", True),
    "print_param_status": unread("the number of trained weights is shown; the list is not.", False),
    "data_shared_file_system": unread("the ranks of each machine share its cache.", False),
    "lora_bf16_mode": unread("trained weights are held in float32.", False),
    **each("use_reentrant_gc upcast_lmhead_output compute_accuracy include_effective_tokens_per_second", as_is()),
    **each("split_special_tokens disable_version_checking", as_is()),  # a person's text holds no control tokens, ever
}

KEYS: dict[str, Fate] = CONVERSIONS | TOLD | UNREAD

# ------------------------------------------------------------------------------------------ words

# Option → their word → ours.
WORDS: dict[str, dict[Any, Any]] = {
    "attn_implementation": {
        "auto": None,
        "disabled": "eager",
        "off": "eager",
        "fa2": "flash_attention_2",
        "fa3": "flash_attention_3",
        True: "flash_attention_2",
        False: None,
    },
    "lora_target_modules": {"all": "all-linear"},
    "freeze_trainable_modules": {"all": None},
    "packing": {None: False},  # theirs: as the stage likes, which is what ours does
    "resume_from_checkpoint": {True: "true", False: None, "false": None},
}
NO_STAGE = "stage {value} does not exist here; the stages are pt, sft and rm."
# Option → a word that it does not have → why, and what to write.
TOLD_WORDS: dict[str, dict[Any, str]] = {
    "stage": {
        **dict.fromkeys(("dpo", "kto", "orpo", "simpo"), f"{NO_STAGE} Preference pairs train a reward model: rm."),
        **dict.fromkeys(("ppo", "grpo"), f"{NO_STAGE} Set one of them."),
    },
    "adapter": {"oft": "OFT is not here. Write lora, freeze or full."},
    "mix_strategy": {
        "interleave_once": "it is not here. Write interleave_under (no row twice) or interleave_over (all rows)."
    },
}

# ------------------------------------------------------------------------------------------ defaults

MARKS = ("finetuning_type", "template")
"""Keys that nobody but a user of LLaMA-Factory writes."""
SPELLINGS: dict[str, tuple[str, ...]] = {
    "max_length": ("max_length", "cutoff_len", "max_source_length", "max_target_length"),
    "lora_r": ("lora_r", "lora_rank"),
    "use_bnb_nested_quant": ("use_bnb_nested_quant", "double_quantization"),
}


def different_defaults(
    spelled: Iterable[str], values: Mapping[str, Any], *, trains: bool, writes: bool
) -> Iterator[str]:
    """Lines about what a recipe of LLaMA-Factory leaves to defaults that differ here; none for other recipes.

    Args:
        spelled: the keys as written.
        values: the options, defaults included.
        trains: whether the recipe trains.
        writes: whether it has answers written.
    """
    given = set(spelled)
    if not given.intersection(MARKS):
        return
    if "max_length" in given:
        yield "max_length is the longest example here, their cutoff_len; answers are bounded by max_new_tokens."
    theirs = {
        name: value
        for name, value in their_defaults(given, values, trains, writes).items()
        if not given.intersection(SPELLINGS.get(name, (name,))) and values[name] != value
    }
    if theirs:
        shown = [f"{name} {json.dumps(value)} (here {plain(values[name])})" for name, value in theirs.items()]
        yield f"LLaMA-Factory's defaults that differ and are not in the recipe: {', '.join(shown)}."


def their_defaults(given: set[str], values: Mapping[str, Any], trains: bool, writes: bool) -> dict[str, Any]:
    """Option → default of LLaMA-Factory, as far as this recipe would feel it."""
    theirs: dict[str, Any] = {"max_length": 2048}
    if trains:
        theirs["learning_rate"] = 5e-5
    if trains and values["adapter"] == "lora":
        rank = values["lora_r"] if given.intersection(SPELLINGS["lora_r"]) else 8
        theirs |= {"lora_r": 8, "lora_alpha": 2 * rank}
    if values["load_in_4bit"]:
        theirs["use_bnb_nested_quant"] = True
    return theirs | ({"do_sample": True, "max_new_tokens": 1024} if writes else {})


def plain(value: Any) -> str:
    """A value as YAML writes it."""
    return "not set" if value is None else json.dumps(value)
