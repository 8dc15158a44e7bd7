"""Loss, batches, loops: prepared rows and a trainable model go in, a trained model comes out."""
