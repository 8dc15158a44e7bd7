"""Packing with a function that joins columns. With packing it is given one example and returns one text."""

from datasets import load_dataset

from tunesmith import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files="path/to/dataset.jsonl", split="train")


def formatting_func(example):
    return f"### Question: {example['question']}\n ### Answer: {example['answer']}"


training_args = SFTConfig(packing=True)

trainer = SFTTrainer(
    "facebook/opt-350m",
    train_dataset=dataset,
    args=training_args,
    formatting_func=formatting_func,
)

trainer.train()
