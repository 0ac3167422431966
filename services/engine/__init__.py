"""The engine: one process that runs one model and serves caravan.engine.v1."""
