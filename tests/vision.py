"""A vision-language model, its processor and images small enough to build in a test, without a file."""

from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    set_seed,
)

from tests import tiny

IMAGE_TOKEN = "<image>"
SIZE, PATCH = 8, 4  # pixels: four patches an image

# LLaVA 1.5's wording: turns as lists of {"type": "text", "text": ...} and {"type": "image"}
TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message.role == 'user' else 'ASSISTANT: ' }}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<image>\n' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}"
    "{{ ' ' if message.role == 'user' else '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_processor() -> LlavaProcessor:
    """The byte tokenizer with an image token, and an image processor that needs pillow only."""
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" takes away again
        chat_template=TEMPLATE,
    )


def make_vision_model() -> LlavaForConditionalGeneration:
    """A seeded float32 LLaVA: the tiny Llama behind a CLIP of one layer."""
    processor = make_processor()
    text = tiny.make_tiny_model(vocab_size=len(processor.tokenizer)).config
    eye = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=eye,
        text_config=LlamaConfig(**text.to_dict()),
        image_token_index=processor.image_token_id,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    config.pad_token_id = processor.tokenizer.pad_token_id
    set_seed(0)
    return LlavaForConditionalGeneration(config)


def rows() -> list[dict]:
    """Two conversations about one image each, as `HuggingFaceH4/llava-instruct-mix-vsft` has them."""
    questions = [("What colour?", "Red."), ("Which colour is it, then?", "It is blue.")]
    colours = [(200, 20, 20), (20, 20, 200)]
    return [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": ask}, {"type": "image", "text": None}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            "images": [Image.new("RGB", (12, 10), colour)],
        }
        for (ask, answer), colour in zip(questions, colours)
    ]
