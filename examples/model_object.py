"""A model that was built outside the trainer, given in place of its name, with the defaults of `SFTConfig`."""

from datasets import load_dataset
from transformers import AutoModelForCausalLM

from tunesmith import SFTConfig, SFTTrainer

dataset = load_dataset("stanfordnlp/imdb", split="train")

model = AutoModelForCausalLM.from_pretrained("facebook/opt-350m")

training_args = SFTConfig(output_dir="/tmp")

trainer = SFTTrainer(
    model,
    train_dataset=dataset,
    args=training_args,
)

trainer.train()
