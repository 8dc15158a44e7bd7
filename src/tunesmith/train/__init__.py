"""Token rows and a model go in, a trained model comes out.

options ─► model (trainable) and rows (datasets) made ready ─► batches (collate) ─► step (head, loss) ─► model

Each trainer adds one thing to the one before, which begins as transformers' `Seq2SeqTrainer`:

    TokenTrainer (step) ─► EvaluatingTrainer (evaluation) ─┬─► GeneratingTrainer (generation) ─► SFTTrainer (sft)
                                                           └─► RewardTrainer (reward, pairwise)
"""
