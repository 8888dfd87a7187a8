"""Text to rows of tokens.

inputs and documents read text, chunks tokenizes it, layout and rows pack documents into rows, and train makes
a tokenizer.
"""
