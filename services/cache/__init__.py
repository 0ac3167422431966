"""The cache service: where the blocks of the KV cache lie, who uses them, who saves them, and who goes first."""
