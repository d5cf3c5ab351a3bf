"""The LLaMA-style decoder, dense or mixture-of-experts; its formulas and its generation."""
