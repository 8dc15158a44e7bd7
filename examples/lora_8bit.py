"""LoRA beside a base model held in 8 bits (bitsandbytes, extra `quant`).

TRL's documentation passes `load_in_8bit=True` to `from_pretrained`; transformers 5 takes it in a `BitsAndBytesConfig`.
"""

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tunesmith import SFTConfig, SFTTrainer

dataset = load_dataset("stanfordnlp/imdb", split="train")

peft_config = LoraConfig(
    r=16,
    lora_alpha=32,
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)

model = AutoModelForCausalLM.from_pretrained(
    "EleutherAI/gpt-neo-125m",
    quantization_config=BitsAndBytesConfig(load_in_8bit=True),
    device_map="auto",
)

trainer = SFTTrainer(
    model,
    train_dataset=dataset,
    args=SFTConfig(),
    peft_config=peft_config,
)

trainer.train()
