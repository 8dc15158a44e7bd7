"""Give a base model a chat format: control tokens, a chat template, embeddings for them; then train on conversations.

The new tokens' embeddings are untrained. Train them: fully, as here, or with `modules_to_save` beside an adapter.
"""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith import SFTConfig, SFTTrainer, setup_chat_format

# Load model and tokenizer
model = AutoModelForCausalLM.from_pretrained("facebook/opt-350m")
tokenizer = AutoTokenizer.from_pretrained("facebook/opt-350m")

# Set up the chat format with default 'chatml' format
model, tokenizer = setup_chat_format(model, tokenizer)

dataset = load_dataset("philschmid/dolly-15k-oai-style", split="train")

trainer = SFTTrainer(
    model,
    args=SFTConfig(output_dir="/tmp"),
    train_dataset=dataset,
    processing_class=tokenizer,
)
trainer.train()
