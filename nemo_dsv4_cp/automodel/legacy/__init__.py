"""What AutoModel 0.5 and 0.6 need alone."""
