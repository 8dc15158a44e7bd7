"""A model card: `README.md` in the output folder, from what the trainer knows, for a person to complete."""

from datasets import load_dataset

from tunesmith import SFTConfig, SFTTrainer

trainer = SFTTrainer(
    "facebook/opt-350m",
    train_dataset=load_dataset("stanfordnlp/imdb", split="train"),
    args=SFTConfig(output_dir="opt-350m-imdb"),
)
trainer.train()
trainer.save_model()
trainer.create_model_card(model_name="opt-350m-imdb", dataset_name="stanfordnlp/imdb", tags="film-reviews")
