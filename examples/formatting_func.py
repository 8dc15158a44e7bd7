"""Columns of any name: a function writes the texts. Without packing it is given a batch and returns a list of texts.

The layout is Stanford Alpaca's. All of the text trains; with a completion-only collator, the answer alone does.
"""

from datasets import load_dataset
from transformers import AutoModelForCausalLM

from tunesmith import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files="path/to/dataset.jsonl", split="train")

model = AutoModelForCausalLM.from_pretrained("facebook/opt-350m")

training_args = SFTConfig(output_dir="/tmp")


def formatting_prompts_func(example):
    output_texts = []
    for i in range(len(example["question"])):
        text = (
            "Below is an instruction that describes a task. Write a response that completes it.\n\n"
            f"### Instruction\n{example['question'][i]}\n\n"
            f"### Response:\n{example['answer'][i]}"
        )
        output_texts.append(text)
    return output_texts


trainer = SFTTrainer(
    model,
    args=training_args,
    train_dataset=dataset,
    formatting_func=formatting_prompts_func,
)

trainer.train()
