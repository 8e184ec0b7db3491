"""The operations: schema, shape rules, gradients and documentation, one file each."""
