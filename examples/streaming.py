"""A dataset that is read as it is trained on, plain or packed. It has no length, so `max_steps` says when to stop."""

from datasets import load_dataset

from tunesmith import SFTConfig, SFTTrainer

dataset = load_dataset("stanfordnlp/imdb", split="train", streaming=True)

trainer = SFTTrainer(
    "facebook/opt-350m",
    train_dataset=dataset,
    args=SFTConfig(output_dir="plain", max_steps=2),
)
trainer.train()

packed_trainer = SFTTrainer(
    "facebook/opt-350m",
    train_dataset=dataset,
    args=SFTConfig(output_dir="packed", max_steps=2, packing=True),
)
packed_trainer.train()
