"""What is checked before and while training: batches, consistency across ranks, finite values."""
