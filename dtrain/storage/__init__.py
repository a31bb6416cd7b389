"""Blobs, manifests and object stores: bytes only. This room knows neither jobs nor tensors nor workers."""
