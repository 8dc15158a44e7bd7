"""Liger kernels in place of the model's norms, rotary embeddings and MLPs: `pip install liger-kernel`, and a GPU.

Liger's authors report 20 % more throughput and 60 % less memory on several GPUs, with FlashAttention, FSDP and
DeepSpeed. Most of that memory is the logits', which tunesmith never holds at once, with Liger or without.
"""

from datasets import load_dataset

from tunesmith import SFTConfig, SFTTrainer

dataset = load_dataset("stanfordnlp/imdb", split="train")

training_args = SFTConfig(use_liger=True)

trainer = SFTTrainer(
    "facebook/opt-350m",
    train_dataset=dataset,
    args=training_args,
)

trainer.train()
