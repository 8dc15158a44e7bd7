"""Rows of constant length made by hand: texts joined by the stop token and cut wherever a row is full.

As in TRL 0.13, documents of one row see each other. `SFTConfig(packing=True)` keeps them apart.
"""

from datasets import load_dataset
from transformers import AutoTokenizer

from tunesmith import ConstantLengthDataset, SFTConfig, SFTTrainer

tokenizer = AutoTokenizer.from_pretrained("facebook/opt-350m")

train_dataset = ConstantLengthDataset(
    tokenizer,
    load_dataset("stanfordnlp/imdb", split="train"),
    dataset_text_field="text",
    infinite=True,
    seq_length=256,
    num_of_sequences=8,
)

trainer = SFTTrainer(
    "facebook/opt-350m",
    train_dataset=train_dataset,
    args=SFTConfig(output_dir="/tmp", max_steps=2),
)
trainer.train()
