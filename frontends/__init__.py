if not __name__.startswith("graphnet."):
    raise ImportError("import graphnet.frontends instead")
"""What people write nets in: the DSL, the models, the importers."""
