"""What `thrifty validate` looks at, a module each: everything that can be wrong before a model is trained."""
