"""Exact attention whose memory grows with the sequence, not with its square.

import flash.attention
o = flash.attention.flash_attention(q, k, v, causal=True)
"""

from ._checkout import require_links

require_links()

from . import attention, decode, dispatch, mods, nn, ring  # noqa: E402  broken links must be named before an import trips over them
from ._version import __version__  # noqa: E402
from .attention import flash_attention, flash_attention_varlen  # noqa: E402
from .decode import flash_attention_decode  # noqa: E402
from .dispatch import info  # noqa: E402
from .kernels.spec import Config  # noqa: E402
from .merge import merge  # noqa: E402
from .paged import PagedCache  # noqa: E402
from .ring import ring_attention  # noqa: E402

__all__ = [
    "Config", "PagedCache", "__version__", "attention", "decode", "dispatch", "flash_attention",
    "flash_attention_decode", "flash_attention_varlen", "info", "merge", "mods", "nn", "ring", "ring_attention",
]  # fmt: skip
