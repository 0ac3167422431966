"""The coordinator: registers engines and gateways, grants leases, knows every request in flight."""
