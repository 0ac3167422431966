"""A provider that answers as it is told: a real HTTP server with the wires of OpenAI, Anthropic and Gemini, and their ways to fail."""
