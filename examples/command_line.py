"""Every option of `SFTConfig` and `ModelConfig` as a flag, by transformers' `HfArgumentParser`.

python examples/command_line.py --model_name_or_path facebook/opt-350m --use_peft --lora_target_modules all-linear
"""

from datasets import load_dataset
from transformers import HfArgumentParser

from tunesmith import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

training_args, model_args = HfArgumentParser((SFTConfig, ModelConfig)).parse_args_into_dataclasses()

trainer = SFTTrainer(
    model=model_args.model_name_or_path,
    args=training_args,
    train_dataset=load_dataset("stanfordnlp/imdb", split="train"),
    peft_config=get_peft_config(model_args),
)
trainer.train()
