"""A dataset that was tokenized elsewhere: its column `input_ids` is used as it is. Without `labels`, all trains."""

from datasets import load_dataset
from transformers import AutoTokenizer

from tunesmith import SFTConfig, SFTTrainer

tokenizer = AutoTokenizer.from_pretrained("facebook/opt-350m")

dataset = load_dataset("stanfordnlp/imdb", split="train")
dataset = dataset.map(lambda example: {"input_ids": tokenizer(example["text"])["input_ids"]}, remove_columns=["text"])

trainer = SFTTrainer(
    "facebook/opt-350m",
    train_dataset=dataset,
    args=SFTConfig(output_dir="/tmp"),
)
trainer.train()
