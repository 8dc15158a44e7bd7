"""The chat templates that an option can name. Each has a golden rendering in tests/data/test_templates.py.

The first eighteen are those of LLaMA-Efficient-Tuning in September 2023, whose layout is
`bos + system + sep + question | answer + eos`, then `sep + bos + question | answer + eos` again and again. Where such
a model marks the end of a turn by a token of its own, that token ends the answer; where it marks none (Baichuan,
ChatGLM2), nothing is written, and `data.spans` has the stop token learnt there all the same.
Sources: `src/llmtuner/extras/template.py` of hiyouga/LLaMA-Factory at 612d97db6^, `src/llamafactory/data/template.py`,
and the models' own `tokenizer_config.json`, which win where they differ.
"""

from tunesmith.data.layout import Template

CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
HONEST = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)


def of_2023(about: str, user: str, sep: str = "", **texts) -> Template:
    """A template in the layout of 2023; `sep` stands behind the system text and before later questions."""
    defaults = {"system": "{system}" + sep, "between": sep + "{bos}", "bos_by_habit": True, "alternates": True}
    return Template(about, user=user, **{**defaults, **texts})


def llama2(about: str, default_system: str) -> Template:
    """Llama 2: the system text is part of the first question."""
    return of_2023(
        about,
        "[INST] {content} [/INST] ",
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        fuse_system=True,
        default_system=default_system,
    )


def chatml(about: str, **texts) -> Template:
    """Turns between `<|im_start|>` and `<|im_end|>`, a line break behind each."""
    defaults = {
        "start": "",
        "system": "<|im_start|>system\n{system}<|im_end|>\n",
        "user": "<|im_start|>user\n{content}<|im_end|>\n",
        "header": "<|im_start|>assistant\n",
        "answer": "{content}<|im_end|>",
        "after": "\n",
        "tokens": ("<|im_start|>", "<|im_end|>"),
        "eos": "<|im_end|>",
    }
    return Template(about, **{**defaults, **texts})


def headed(about: str, begin: str, end: str, stop: str) -> Template:
    """Llama 3 and 4: the role between two tokens, an empty line, the turn, a stop token."""
    return Template(
        about,
        system=f"{begin}system{end}\n\n{{stripped_system}}{stop}",
        user=f"{begin}user{end}\n\n{{content}}{stop}",
        header=f"{begin}assistant{end}\n\n",
        answer=f"{{content}}{stop}",
        trim=True,
        tokens=(begin, end, stop),
        eos=stop,
    )


TEMPLATES: dict[str, Template] = {
    # ---- September 2023 ----
    "vanilla": of_2023("Base models: the last question alone.", "{content}", system="", use_history=False),
    "default": of_2023("Any base model.", "Human: {content}\nAssistant: ", "\n", default_system=CURIOUS_USER),
    "llama2": llama2("Llama 2 Chat.", HONEST),
    "llama2_zh": llama2("Chinese-LLaMA-Alpaca-2.", "You are a helpful assistant. 你是一个乐于助人的助手。"),
    "alpaca": of_2023(
        "Alpaca, Chinese-LLaMA-Alpaca.",
        "### Instruction:\n{content}\n\n### Response:\n",
        "\n\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
    ),
    "vicuna": of_2023("Vicuna 1.1.", "USER: {content} ASSISTANT: ", default_system=CURIOUS_USER),
    "belle": of_2023("BELLE-LLaMA-EXT.", "Human: {content}\n\nBelle: ", "\n\n"),
    "linly": of_2023("Linly.", "User: {content}\nBot: ", "\n"),
    "billa": of_2023("BiLLa.", "Human: {content}\nAssistant: ", "\n"),
    "ziya": of_2023("Ziya-LLaMA-13B.", "<human>:{content}\n<bot>:", "\n", tokens=("<human>", "<bot>")),
    "aquila": of_2023("AquilaChat-7B.", "Human: {content}###Assistant: ", "###", default_system=CURIOUS_HUMAN),
    "intern": of_2023(
        "InternLM-Chat-7B.",
        "<|User|>:{content}<eoh>\n<|Bot|>:",
        "\n",
        system="{system}<eoa>\n",
        answer="{content}<eoa>",
        tokens=("<eoh>", "<eoa>"),
        eos="<eoa>",
    ),
    "baichuan": of_2023(
        "Baichuan-13B-Chat.",
        "<reserved_102>{content}<reserved_103>",
        answer="{content}",
        tokens=("<reserved_102>", "<reserved_103>"),
    ),
    "baichuan2": of_2023(
        "Baichuan2-Chat.",
        "<reserved_106>{content}<reserved_107>",
        answer="{content}",
        tokens=("<reserved_106>", "<reserved_107>"),
    ),
    "starchat": of_2023(
        "StarChat.",
        "<|user|>\n{content}<|end|>\n<|assistant|>",
        "\n",
        system="<|system|>\n{system}<|end|>\n",
        always_system=True,
        answer="{content}<|end|>",
        tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|end|>",
    ),
    "chatml": of_2023(
        "Qwen-7B-Chat, and base models that have its tokens.",
        "<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
        "\n",
        system="<|im_start|>system\n{system}<|im_end|>\n",
        default_system="You are a helpful assistant.",
        answer="{content}<|im_end|>",
        tokens=("<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
    ),
    "chatglm2": of_2023(
        "ChatGLM2-6B; rounds count from 0, as in LLaMA-Factory (the model's own code counts from 1).",
        "[Round {round}]\n\n问：{content}\n\n答：",
        "\n\n",
        system="[gMASK]sop{system}\n\n",
        always_system=True,
        answer="{content}",
        tokens=("[gMASK]", "sop"),
    ),
    "xverse": of_2023("XVERSE-13B-Chat.", "Human: {content}\n\nAssistant: "),
    # ---- today ----
    "llama3": headed("Llama 3 Instruct, as of April 2024.", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama4": headed("Llama 4 Instruct.", "<|header_start|>", "<|header_end|>", "<|eot|>"),
    "qwen": chatml(
        "Qwen2.5 Instruct, with tools.",
        file="qwen.jinja",
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "qwen3": chatml("Qwen3 that thinks, with tools; takes `enable_thinking`.", file="qwen3.jinja"),
    "qwen3_nothink": chatml("Qwen3 Instruct 2507 and other Qwen3 that never think, with tools.", file="qwen.jinja"),
    "smollm": chatml("SmolLM Instruct."),
    "smollm2": chatml(
        "SmolLM2 Instruct.",
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    ),
    "yi": chatml("Yi Chat."),
    "gemma": Template(
        "Gemma 1 to 3 Instruct.",
        system="{system}\n\n",
        fuse_system=True,
        user="<start_of_turn>user\n{content}<end_of_turn>\n",
        header="<start_of_turn>model\n",
        answer="{content}<end_of_turn>",
        after="\n",
        trim=True,
        alternates=True,
        tokens=("<start_of_turn>", "<end_of_turn>"),
        eos="<end_of_turn>",
    ),
    "mistral": Template(
        "Mistral and Mixtral Instruct, tokenizer v3.",
        system="{system}\n\n",
        fuse_system=True,
        user="[INST] {content}[/INST]",
        answer=" {content}{eos}",
        alternates=True,
    ),
    "ministral": Template(
        "Mistral Nemo and Ministral, tokenizer v3 tekken.",
        system="{system}\n\n",
        fuse_system=True,
        user="[INST]{content}[/INST]",
        alternates=True,
    ),
    "phi": Template(
        "Phi-3 and Phi-3.5.",
        start="",
        system="<|system|>\n{system}<|end|>\n",
        user="<|user|>\n{content}<|end|>\n",
        header="<|assistant|>\n",
        answer="{content}<|end|>",
        after="\n",
        tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|end|>",
    ),
    "phi4": Template(
        "Phi-4.",
        start="",
        system="<|im_start|>system<|im_sep|>{system}<|im_end|>",
        user="<|im_start|>user<|im_sep|>{content}<|im_end|>",
        header="<|im_start|>assistant<|im_sep|>",
        answer="{content}<|im_end|>",
        tokens=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        eos="<|im_end|>",
    ),
    "deepseek": Template(
        "DeepSeek LLM and V2 Chat.",
        system="{system}\n\n",
        user="User: {content}\n\n",
        header="Assistant:",
        answer=" {content}{eos}",
    ),
    "deepseek3": Template(
        "DeepSeek V3 without thinking.",
        system="{system}",
        user="<｜User｜>{content}",
        header="<｜Assistant｜>",
        tokens=("<｜User｜>", "<｜Assistant｜>"),
    ),
    "glm4": Template(
        "GLM-4-9B Chat.",
        start="[gMASK]<sop>",
        system="<|system|>\n{system}",
        user="<|user|>\n{content}",
        header="<|assistant|>",
        answer="\n{content}",
        tokens=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "granite3": Template(
        "Granite 3 Instruct.",
        start="",
        system="<|start_of_role|>system<|end_of_role|>{system}<|end_of_text|>\n",
        user="<|start_of_role|>user<|end_of_role|>{content}<|end_of_text|>\n",
        header="<|start_of_role|>assistant<|end_of_role|>",
        answer="{content}<|end_of_text|>",
        after="\n",
        tokens=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        eos="<|end_of_text|>",
    ),
    "cohere": Template(
        "Aya and Command R.",
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{system}<|END_OF_TURN_TOKEN|>",
        user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        header="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        answer="{content}<|END_OF_TURN_TOKEN|>",
        trim=True,
        alternates=True,
        tokens=(
            "<|START_OF_TURN_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
        ),
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    "exaone": Template(
        "EXAONE 3 and 3.5 Instruct.",
        start="",
        system="[|system|]{system}[|endofturn|]\n",
        user="[|user|]{content}\n",
        header="[|assistant|]",
        answer="{content}[|endofturn|]",
        after="\n",
        tokens=("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
        eos="[|endofturn|]",
    ),
    "zephyr": Template(
        "Zephyr 7B.",
        start="",
        system="<|system|>\n{system}{eos}\n",
        user="<|user|>\n{content}{eos}\n",
        header="<|assistant|>\n",
        after="\n",
    ),
}

# Other names of a template.
ALIASES: dict[str, str] = {
    "gemma2": "gemma",
    "gemma3": "gemma",
    "phi3": "phi",
    "phi3.5": "phi",
    "qwen2.5": "qwen",
    "qwen2_5": "qwen",
    "deepseek_v3": "deepseek3",
    "aya": "cohere",
}
