"""Recipes as users of LLaMA-Factory write them, from the pieces that its examples are made of (0.8 to 0.9)."""

MODEL = "### model\nmodel_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct\ntrust_remote_code: true\n"
LORA = "### method\nstage: {stage}\ndo_train: true\nfinetuning_type: lora\nlora_rank: 8\nlora_target: all\n"
DATA = """### dataset
dataset: {dataset}
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
"""
OUTPUT = """### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]
"""
TRAIN = """### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
EVAL = "### eval\nval_size: 0.1\nper_device_eval_batch_size: 1\neval_strategy: steps\neval_steps: 500\n"


def training(stage: str = "sft", dataset: str = "identity,alpaca_en_demo", method: str = LORA, more: str = "") -> str:
    parts = (MODEL, method, DATA, OUTPUT, TRAIN, EVAL, more)
    return "".join(parts).replace("{stage}", stage).replace("{dataset}", dataset)


SFT = training()
PRETRAIN = training("pt", "c4_demo").replace("template: llama3\n", "")
REWARD = training("rm", "dpo_en_demo")
DPO = training("dpo", "dpo_en_demo", more="pref_beta: 0.1\npref_loss: sigmoid\n")
FULL = training(method="stage: sft\ndo_train: true\nfinetuning_type: full\n")
FREEZE = training(
    method="stage: sft\ndo_train: true\nfinetuning_type: freeze\nfreeze_trainable_layers: 8\n"
    "freeze_trainable_modules: all\n"
)
QLORA = training(more="quantization_bit: 4  # choices: [8, 4]\nquantization_method: bnb\n")
PISSA = training(more="pissa_init: true\npissa_iter: 16\npissa_convert: true\n")
PREDICT = """### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
adapter_name_or_path: saves/llama3-8b/lora/sft
stage: sft
do_predict: true
finetuning_type: lora
eval_dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 50
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/predict
overwrite_output_dir: true
per_device_eval_batch_size: 1
predict_with_generate: true
ddp_timeout: 180000000
"""
MERGE = MODEL + "adapter_name_or_path: a\ntemplate: llama3\nexport_dir: out\nexport_size: 2\nexport_device: cpu\n"
INFERENCE = MODEL + "adapter_name_or_path: a\ntemplate: llama3\nfinetuning_type: lora\ninfer_backend: huggingface\n"
BENCHMARK = (
    MODEL
    + "finetuning_type: lora\ntask: mmlu_test\ntemplate: fewshot\nlang: en\nn_shot: 5\nsave_dir: out\nbatch_size: 4\n"
)
ERA_FLAGS = (
    "--stage sft --do_train --model_name_or_path base --dataset alpaca_gpt4_zh --template default "
    "--finetuning_type lora --lora_target q_proj,v_proj --output_dir out --overwrite_cache "
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 4 --lr_scheduler_type cosine --logging_steps 10 "
    "--save_steps 1000 --learning_rate 5e-5 --num_train_epochs 3.0 --plot_loss --max_source_length 256 "
    "--max_target_length 256 --fp16"
)
