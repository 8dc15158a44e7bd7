"""Numbers and texts out of a model.

Example ─ questions ─► prompt, expected ─ generate ─► answer ─ predict ─► a line of a file ─ metrics ─► figures

    generate   sampling: a row's draws are its own, so its answer does not depend on its batch
    metrics    similarity: BLEU-4 and ROUGE, Chinese too
    flops      the arithmetic of a step, counted on a model without weights
"""
