"""What XLA has to be told: barriers, forms of a product that depend on the platform, random bits,
native kernels.

The rest of the package says what is computed; only this room knows the compiler.
"""
