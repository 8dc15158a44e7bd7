"""The steps of a run: each reads from the recipe what the module that does the work takes as plain parameters.

recipe ─ model.tokenizer_of ─► tokenizer ─ data.prepare_data ─► token rows ─ model.trainable_model ─► model
       ─ options.trainer_arguments ─► arguments of the stage's trainer ─ answers.answered ─► answers, scored
"""
