"""The transport: gRPC in, calls of the registry out. Knows messages and status codes, no rules and no arrays' meaning."""
