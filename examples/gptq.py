"""A model that will be converted to GPTQ: TRL's documentation advises at most 4 accumulation steps, and this has 4."""

from datasets import load_dataset

from tunesmith import SFTConfig, SFTTrainer

trainer = SFTTrainer(
    "facebook/opt-350m",
    train_dataset=load_dataset("stanfordnlp/imdb", split="train"),
    args=SFTConfig(output_dir="/tmp", per_device_train_batch_size=1, gradient_accumulation_steps=4),
)
trainer.train()
