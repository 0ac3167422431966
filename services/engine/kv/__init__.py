"""The KV cache of an engine: keys, block files, the RAM tier, publication, and the session with the cache service."""
