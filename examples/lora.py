"""LoRA: an adapter trains beside the frozen model, and is all that is saved.

A chat template with control tokens that the base never saw (ChatML, Llama 3) needs the embeddings and the head in
`modules_to_save`: without them the model does not learn to stop. TRL's documentation spells `embed_tokens` as
`embed_token`, which names nothing; here that is an error.
"""

from datasets import load_dataset
from peft import LoraConfig

from tunesmith import SFTConfig, SFTTrainer

dataset = load_dataset("trl-lib/Capybara", split="train")

peft_config = LoraConfig(
    r=16,
    lora_alpha=32,
    lora_dropout=0.05,
    target_modules="all-linear",
    modules_to_save=["lm_head", "embed_tokens"],
    task_type="CAUSAL_LM",
)

trainer = SFTTrainer(
    "Qwen/Qwen2.5-0.5B",
    train_dataset=dataset,
    args=SFTConfig(output_dir="Qwen2.5-0.5B-SFT"),
    peft_config=peft_config,
)

trainer.train()
trainer.save_model()
