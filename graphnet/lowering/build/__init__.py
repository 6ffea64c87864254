"""Binaries without a device: workers that compile, and the cache that verifies."""
