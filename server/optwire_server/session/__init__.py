"""The session machine: what may happen to a session, and what must follow. Pure: no clock, lock, array, gRPC or JAX."""
