"""Conversations (`messages` with `role` and `content`) from a file or the Hub, rendered by the model's own template.

The model needs a chat template. `facebook/opt-350m`, which TRL's documentation has here, has none; `chat_format.py`
shows how to give it one.
"""

from datasets import load_dataset

from tunesmith import SFTConfig, SFTTrainer

# load jsonl dataset
dataset = load_dataset("json", data_files="path/to/dataset.jsonl", split="train")

# load dataset from the HuggingFace Hub
dataset = load_dataset("philschmid/dolly-15k-oai-style", split="train")

training_args = SFTConfig(packing=True)

trainer = SFTTrainer(
    "Qwen/Qwen2.5-0.5B",
    args=training_args,
    train_dataset=dataset,
)
trainer.train()
