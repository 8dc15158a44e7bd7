"""Numbers and texts out of a model: batched generation, predictions, metrics over them."""
