"""Train an adapter further: load it as a `PeftModel` with `is_trainable=True`, and give no `peft_config`."""

from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tunesmith import SFTConfig, SFTTrainer

dataset = load_dataset("trl-lib/Capybara", split="train")

base_model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B")
model = PeftModel.from_pretrained(base_model, "Qwen2.5-0.5B-SFT", is_trainable=True)

trainer = SFTTrainer(
    model,
    train_dataset=dataset,
    args=SFTConfig(output_dir="Qwen2.5-0.5B-SFT-2"),
)

trainer.train()
trainer.save_model()
