"""Train on answers only, where texts are built by a function: the loss begins after the response template.

For rows with `prompt` and `completion` columns, or `messages`, none of this is needed: only answers train by default.
"""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith import DataCollatorForCompletionOnlyLM, SFTConfig, SFTTrainer

dataset = load_dataset("lucasmccabe-lmi/CodeAlpaca-20k", split="train")

model = AutoModelForCausalLM.from_pretrained("facebook/opt-350m")
tokenizer = AutoTokenizer.from_pretrained("facebook/opt-350m")


def formatting_prompts_func(example):
    output_texts = []
    for i in range(len(example["instruction"])):
        text = f"### Question: {example['instruction'][i]}\n ### Answer: {example['output'][i]}"
        output_texts.append(text)
    return output_texts


response_template = " ### Answer:"
collator = DataCollatorForCompletionOnlyLM(response_template, tokenizer=tokenizer)

trainer = SFTTrainer(
    model,
    train_dataset=dataset,
    args=SFTConfig(output_dir="/tmp"),
    formatting_func=formatting_prompts_func,
    data_collator=collator,
)

trainer.train()
