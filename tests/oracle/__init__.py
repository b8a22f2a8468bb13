"""transformers as the judge."""
