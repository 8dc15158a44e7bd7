"""What leaves a run: one merged model, its card, the last lines of the output, and a model to talk to.

run ─ merge ─► one checkpoint, read back and compared      ─ card ─► README.md      ─ summary ─► what a person reads
model ─ answer ─► an answer as it is written ─► chat (the terminal), web (OpenAI-style endpoints; beside it the studio)
"""
