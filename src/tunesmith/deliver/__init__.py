"""What leaves the run: one merged checkpoint, and a chat in the terminal."""
