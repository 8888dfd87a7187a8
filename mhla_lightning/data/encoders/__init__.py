"""Pretrained networks that turn pixels and captions into tensors."""
