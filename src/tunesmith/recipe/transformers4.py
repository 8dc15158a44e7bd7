"""Options of transformers 4 that transformers 5 dropped or calls otherwise, and two of TRL; aliases are in config.py.

`train/legacy.py` says the same for the Python door, where they are fields of a dataclass.
"""

from tunesmith.recipe.fates import Fate, as_is, becomes, each, switch, told, unread

AUTOCAST = "there is one half precision since transformers 5, torch's autocast. Remove it; set fp16 or bf16"

OLD_KEYS: dict[str, Fate] = {
    "group_by_length": switch({"train_sampling_strategy": "group_by_length"}),
    "adafactor": switch({"optim": "adafactor"}),
    "include_inputs_for_metrics": switch({"include_for_metrics": ["inputs"]}),
    "per_gpu_train_batch_size": becomes(int | None, lambda rows: {"per_device_train_batch_size": rows}),
    "per_gpu_eval_batch_size": becomes(int | None, lambda rows: {"per_device_eval_batch_size": rows}),
    "dispatch_batches": becomes(bool | None, lambda on: accelerator("dispatch_batches", on)),
    "split_batches": becomes(bool | None, lambda on: accelerator("split_batches", on)),
    "fsdp_min_num_params": told("write fsdp_config: {min_num_params: {value}}", 0),
    "fsdp_transformer_layer_cls_to_wrap": told("write fsdp_config: {transformer_layer_cls_to_wrap: [{value}]}"),
    "sharded_ddp": told("fairscale's sharding is gone. Write fsdp: true", "", False),
    "push_to_hub_organization": told("write hub_model_id: {value}/NAME"),
    "generation_config": told("write max_new_tokens, do_sample, temperature, top_p, ... directly"),
    "sortish_sampler": told("transformers does not read it. Write train_sampling_strategy: group_by_length", False),
    "save_safetensors": told("weights are always saved as safetensors. Remove it", True),
    "use_mps_device": told("an Apple GPU is used wherever there is one. Remove it", False),
    "jit_mode_eval": told("transformers 5 evaluates no TorchScript. Remove it, or set torch_compile: true", False),
    "use_ipex": told("transformers 5 knows no Intel extension; torch has its kernels. Remove it", False),
    "fp16_opt_level": told("transformers 5 knows no NVIDIA Apex. Remove it; set fp16 or bf16", "O1"),
    **each("fp16_backend half_precision_backend", told(AUTOCAST, "auto")),
    "tpu_num_cores": told("the launcher says how many processes run. Remove it; use `accelerate launch`"),
    "tpu_metrics_debug": told("write debug: tpu_metrics_debug", False),
    "past_index": told("no model of today returns such a state. Remove it", -1),
    "mp_parameters": told("SageMaker's model parallelism is not driven here. Remove it; use fsdp or deepspeed", ""),
    "ray_scope": told("it is an argument of hyperparameter_search in Python. Remove it", "last"),
    "use_legacy_prediction_loop": told("transformers 5 has one evaluation loop. Remove it", False),
    "xpu_backend": told("write ddp_backend: {value}"),
    "logging_dir": unread("TensorBoard's files lie in output_dir/runs, or where TENSORBOARD_LOGGING_DIR says."),
    "include_tokens_per_second": as_is(),
    # TRL's
    "assistant_only_loss": switch({"train_on": "assistant"}, {"train_on": "all"}),
    "completion_only_loss": switch({"train_on": "completion"}, {"train_on": "all"}),
}
OLD_WORDS: dict[str, dict[str, str]] = {"optim": {"adamw_hf": "adamw_torch"}}  # its own AdamW, the default until 2023


def accelerator(key: str, on: bool | None) -> dict[str, dict[str, bool]]:
    """A word of `accelerator_config`."""
    return {} if on is None else {"accelerator_config": {key: on}}
