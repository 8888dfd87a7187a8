"""Export formats: the content of the written folder, one module per format."""
