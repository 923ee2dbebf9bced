"""Triton kernels of hfac, installed as `hfac.triton_kernels`."""

if __name__ != "hfac.triton_kernels":
    raise ImportError(
        f"this folder is the package hfac.triton_kernels and was imported as {__name__!r}, a name that belongs to "
        "another project. Import hfac.triton_kernels, and leave the checkout's root off the front of sys.path."
    )
