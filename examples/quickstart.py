"""Quickstart: a model's name, a dataset with a `text` column, and the options that differ from their defaults.

Texts longer than `max_seq_length` tokens are cut; without it, that is 1024 or what the tokenizer was made for.
"""

from datasets import load_dataset

from tunesmith import SFTConfig, SFTTrainer

dataset = load_dataset("stanfordnlp/imdb", split="train")

training_args = SFTConfig(
    max_seq_length=512,
    output_dir="/tmp",
)
trainer = SFTTrainer(
    "facebook/opt-350m",
    train_dataset=dataset,
    args=training_args,
)
trainer.train()
