"""Corpora, tokenizer, the packed token store and the resumable order of samples."""
