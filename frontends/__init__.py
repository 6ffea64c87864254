if not __name__.startswith("graphnet."):
    raise ImportError("import graphnet.frontends instead")  # noqa: E701
"""What people write nets in: the DSL, the models, the importers."""
