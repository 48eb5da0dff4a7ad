"""The products that pass over whole factors, compiled for this machine's processor. Off unless asked for."""

from sdsopt.linalg.native.kernels import kernels_for, use_native_products

__all__ = ["kernels_for", "use_native_products"]
