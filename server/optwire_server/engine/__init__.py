"""The engine: the only owner of devices. Compiles updates, holds state, lands payloads. Knows no sessions, no gRPC."""
