"""Train on the assistant's turns of conversations that are plain text with markers, as in OpenAssistant Guanaco.

With both templates every assistant turn trains, each up to the next instruction template.
"""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith import DataCollatorForCompletionOnlyLM, SFTConfig, SFTTrainer

dataset = load_dataset("timdettmers/openassistant-guanaco", split="train")

model = AutoModelForCausalLM.from_pretrained("facebook/opt-350m")
tokenizer = AutoTokenizer.from_pretrained("facebook/opt-350m")

instruction_template = "### Human:"
response_template = "### Assistant:"
collator = DataCollatorForCompletionOnlyLM(
    instruction_template=instruction_template, response_template=response_template, tokenizer=tokenizer, mlm=False
)

trainer = SFTTrainer(
    model,
    args=SFTConfig(output_dir="/tmp"),
    train_dataset=dataset,
    data_collator=collator,
)

trainer.train()
