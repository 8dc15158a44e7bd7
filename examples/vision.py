"""A vision-language model: a collator of one's own renders the conversations and reads the images, batch by batch.

`remove_unused_columns=False` and `skip_prepare_dataset` let the raw rows through to it. (The text of TRL's
documentation says to set both to `True`; its code, and this, sets the first to `False`.)
"""

from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

from tunesmith import SFTConfig, SFTTrainer

messages = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Who is this?"},
            {"type": "image"},
        ],
    },
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "Barack Obama"},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is he famous for?"},
        ],
    },
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "He is the 44th President of the United States."},
        ],
    },
]

processor = AutoProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf")
print(processor.apply_chat_template(messages, tokenize=False))


def collate_fn(examples):
    # Get the texts and images, and apply the chat template
    texts = [processor.apply_chat_template(example["messages"], tokenize=False) for example in examples]
    images = [example["images"][0] for example in examples]

    # Tokenize the texts and process the images; by name, because transformers 5 takes images first
    batch = processor(text=texts, images=images, return_tensors="pt", padding=True)

    # The labels are the input_ids, and we mask the padding tokens in the loss computation
    labels = batch["input_ids"].clone()
    labels[batch["attention_mask"] == 0] = -100  # by place: padding may have the stop token's id, which trains
    labels[labels == processor.image_token_id] = -100  # nobody writes image tokens
    batch["labels"] = labels

    return batch


dataset = load_dataset("HuggingFaceH4/llava-instruct-mix-vsft", split="train")
examples = [dataset[0], dataset[1]]  # Just two examples for the sake of the example
collated_data = collate_fn(examples)
print(collated_data.keys())  # dict_keys(['input_ids', 'attention_mask', 'pixel_values', 'labels'])

model = AutoModelForImageTextToText.from_pretrained("llava-hf/llava-1.5-7b-hf")

training_args = SFTConfig(output_dir="/tmp")
training_args.remove_unused_columns = False
training_args.dataset_kwargs = {"skip_prepare_dataset": True}

trainer = SFTTrainer(
    model=model,
    args=training_args,
    data_collator=collate_fn,
    train_dataset=dataset,
    processing_class=processor.tokenizer,
)

trainer.train()
