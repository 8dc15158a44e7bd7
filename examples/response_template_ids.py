"""A response template as token ids, for tokenizers such as Llama 2's that write the same text in two ways.

At the beginning of a text, "### Assistant:" begins with the token `▁###`; after a newline it does not, so a template
encoded alone is never found in a row. Encoded with the newline before it, and without that newline's tokens, it is.
"""

from transformers import AutoTokenizer

from tunesmith import DataCollatorForCompletionOnlyLM

tokenizer = AutoTokenizer.from_pretrained("meta-llama/Llama-2-7b-hf")


def print_tokens_with_ids(txt):
    tokens = tokenizer.tokenize(txt, add_special_tokens=False)
    token_ids = tokenizer.encode(txt, add_special_tokens=False)
    print(list(zip(tokens, token_ids)))


prompt = """### User: Hello\n\n### Assistant: Hi, how can I help you?"""
print_tokens_with_ids(
    prompt
)  # [..., ('▁Hello', 15043), ('<0x0A>', 13), ('<0x0A>', 13), ('##', 2277), ('#', 29937), ...]

response_template = "### Assistant:"
print_tokens_with_ids(response_template)  # [('▁###', 835), ('▁Ass', 4007), ('istant', 22137), (':', 29901)]

response_template_with_context = "\n### Assistant:"  # the newline is context enough for this tokenizer
# [2277, 29937, 4007, 22137, 29901], as in the texts
response_template_ids = tokenizer.encode(response_template_with_context, add_special_tokens=False)[2:]

data_collator = DataCollatorForCompletionOnlyLM(response_template_ids, tokenizer=tokenizer)
