"""Text to rows of tokens: what can be read, how it is tokenized, how documents are packed into rows, and
how a tokenizer is trained.
"""
