"""The transport: gRPC in, calls of the registry out. Knows messages and status codes, no update rules."""
