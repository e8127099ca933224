"""Core types: Region, Plan, Budget, Method, errors, registry."""
