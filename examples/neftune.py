"""NEFTune (arXiv:2310.05914): noise on the embeddings while training, none afterwards.

The paper takes LLaMA-2-7B tuned on Alpaca from 29.79 % to 64.69 % on AlpacaEval, and models tuned on Evol-Instruct,
ShareGPT and OpenPlatypus up by 10, 8 and 8 points; TRL's authors saw about 25 % on MT-Bench with Mistral-7B on
OpenAssistant. On synthetic data such as UltraChat it does less. None of this was measured here.
"""

from datasets import load_dataset

from tunesmith import SFTConfig, SFTTrainer

dataset = load_dataset("stanfordnlp/imdb", split="train")

training_args = SFTConfig(
    neftune_noise_alpha=5,
)

trainer = SFTTrainer(
    "facebook/opt-350m",
    train_dataset=dataset,
    args=training_args,
)

trainer.train()
