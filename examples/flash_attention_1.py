"""Allow PyTorch's flash kernel only. It reads no padding mask, so it goes with packing; on a GPU, in half precision.

`torch.backends.cuda.sdp_kernel(...)` of TRL's documentation is now `torch.nn.attention.sdpa_kernel`. Nobody has to do
this: without it, flat batches already take the flash kernel wherever there is one.
"""

from datasets import load_dataset
from torch.nn.attention import SDPBackend, sdpa_kernel

from tunesmith import SFTConfig, SFTTrainer

dataset = load_dataset("stanfordnlp/imdb", split="train")

training_args = SFTConfig(
    packing=True,
    model_init_kwargs={"torch_dtype": "bfloat16"},
    output_dir="/tmp",
)

trainer = SFTTrainer(
    "facebook/opt-350m",
    train_dataset=dataset,
    args=training_args,
)

with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
    trainer.train()
