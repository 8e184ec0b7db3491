"""CLIP with adapters, its own frozen teacher and three heads; on disk and in memory."""
