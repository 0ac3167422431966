"""The spine that every service shares: clock, errors, settings, server, channels, telemetry, metrics."""
