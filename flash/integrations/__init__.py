"""Other front doors, each a thin translation to `flash.attention.flash_attention`; import the one that you need.

sdpa              torch's F.scaled_dot_product_attention, by name or in a scope
sdpa_registry     the same and varlen_attn, below all Python, through torch's own registry
flash_attn        the functions of the flash-attn package
transformers      attention of Hugging Face models
neuralforecast    attention of neuralforecast's time-series models
onnx              export to ONNX's Attention nodes

A package that is named here is imported by the functions that need it, never with this one.
"""

from importlib.util import find_spec


def need(package: str) -> None:
    """Check that a package is there which an extra of that name installs.

    Args:
        package: its name in Python, "transformers" or "neuralforecast".

    Raises:
        ImportError: it is not; the message says how to install it.
    """
    if find_spec(package) is None:
        raise ImportError(f"{package} is not installed: pip install 'flash-triton[{package}]'")
