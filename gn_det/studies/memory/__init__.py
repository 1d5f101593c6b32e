"""What a training step keeps in memory, and what fits on a card."""
