"""From launches to binaries: workers that compile, a cache that verifies, and the report."""
