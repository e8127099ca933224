"""The command line: parse, call, print. No logic of its own, and no other room imports it."""

__all__: list[str] = []
