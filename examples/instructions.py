"""Instructions (`prompt` and `completion`) from a file: a user turn and an assistant turn of the model's template.

Only completions train; `SFTConfig(train_on="all")` trains prompts, too, as TRL 0.13 did.
"""

from datasets import load_dataset

from tunesmith import SFTConfig, SFTTrainer

# each line: {"prompt": "<prompt text>", "completion": "<ideal generated text>"}
dataset = load_dataset("json", data_files="path/to/dataset.jsonl", split="train")

training_args = SFTConfig(packing=True)

trainer = SFTTrainer(
    "Qwen/Qwen2.5-0.5B",
    args=training_args,
    train_dataset=dataset,
)
trainer.train()
