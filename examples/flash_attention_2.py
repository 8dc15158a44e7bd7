"""FlashAttention 2, a base in 4 bits, and an adapter. Needs a GPU and `pip install flash-attn`; rows may be padded.

TRL's documentation passes `load_in_4bit=True` to `from_pretrained`; transformers 5 takes it in a `BitsAndBytesConfig`.
"""

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tunesmith import SFTConfig, SFTTrainer

dataset = load_dataset("stanfordnlp/imdb", split="train")

model_id = "facebook/opt-350m"

model = AutoModelForCausalLM.from_pretrained(
    model_id,
    quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
    attn_implementation="flash_attention_2",
)

trainer = SFTTrainer(
    model,
    train_dataset=dataset,
    args=SFTConfig(output_dir="/tmp"),
    peft_config=LoraConfig(task_type="CAUSAL_LM"),
)

trainer.train()
