"""thrifty inside other people's tools. Each module is imported by its own name; no room imports these."""
