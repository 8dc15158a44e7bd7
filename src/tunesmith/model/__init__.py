"""A name becomes a trainable model: load → adapt, with attention that keeps documents apart."""
