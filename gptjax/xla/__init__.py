"""Everything specific to XLA: barriers, platform-dependent forms of products, random bits, native
kernels.

Only this room knows the compiler; the rest of the package defines what is computed.
"""
