"""Packing of the training set only: `eval_packing=False` keeps one evaluation example a row."""

from datasets import load_dataset

from tunesmith import SFTConfig, SFTTrainer

training_args = SFTConfig(packing=True, eval_packing=False, eval_strategy="epoch")

trainer = SFTTrainer(
    "facebook/opt-350m",
    train_dataset=load_dataset("stanfordnlp/imdb", split="train"),
    eval_dataset=load_dataset("stanfordnlp/imdb", split="test"),
    args=training_args,
)

trainer.train()
