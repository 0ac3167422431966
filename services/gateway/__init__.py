"""The gateway: validates requests, owns each one to its end, and speaks the OpenAI wire format."""
