"""The engine in front of a provider: the contract of an engine, served by somebody else's API."""
