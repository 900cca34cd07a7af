"""Codecs: how gradients travel to the server, and parameters back, in fewer bytes. NumPy only.

docs/codecs.md has the layout on the wire. A new codec is one module here, a value of ``Kind``, and its place in
``_KINDS``.
"""

from __future__ import annotations

import re
from typing import Final

from optwire_proto import errors
from optwire_proto.codecs.casts import BF16, F16, Cast
from optwire_proto.codecs.codec import Codec, Kind, Read, reader
from optwire_proto.codecs.decoder import Decoder, scratch_bytes, views, where
from optwire_proto.codecs.encoder import views as payload_views
from optwire_proto.codecs.int8 import Int8
from optwire_proto.codecs.raw import Raw
from optwire_proto.codecs.sign import Sign
from optwire_proto.codecs.top_k import FRACTION as TOP_K_FRACTION
from optwire_proto.codecs.top_k import TopK

RAW: Final = Raw()
_KINDS: Final[dict[Kind, type[Codec]]] = {kind.kind: kind for kind in (Raw, BF16, F16, Int8, TopK, Sign)}
_TOP_K: Final = re.compile(r"top_k\(([0-9.eE+-]{1,32})\)")
_EXPECTED: Final = "one of f32, bf16, f16, int8, top_k(0.01), sign"


def parse(text: object, what: str = "codec") -> Codec:
    """The codec that a text means: "f32", "bf16", "f16", "int8", "sign", or "top_k(0.01)" for a hundredth of all.

    Args:
      text: of a codec.
      what: what to call it in an error.

    Raises:
      InvalidArgumentError: it means none.
    """
    if isinstance(text, str):
        plain = {str(RAW): RAW, "top_k": TopK()} | {str(made): made for made in (BF16(), F16(), Int8(), Sign())}
        if text in plain:
            return plain[text]
        if found := _TOP_K.fullmatch(text):
            try:
                return TopK(float(found[1]))
            except ValueError:  # no number, or one that is no fraction
                pass
    got = repr(text[:80] if isinstance(text, str) else text)[:82]
    expected = f"{_EXPECTED} with a fraction above 0, up to 0.5"
    raise errors.InvalidArgumentError(f"{what}: {got}, expected {expected}", subject=what, expected=expected, got=got)


def of(kind: Kind, fraction: float) -> Codec:
    """The codec of a kind; ``fraction`` is that of TOP_K."""
    return TopK(fraction) if kind is Kind.TOP_K else _KINDS[kind]()


def fraction(*used: Codec) -> float:
    """The fraction that the codecs of a session have in common; 0 where none has one.

    Raises:
      InvalidArgumentError: there are two.
    """
    found = sorted({one.fraction for one in used if isinstance(one, TopK)})
    if len(found) > 1:
        raise errors.InvalidArgumentError(
            f"grads_codec, params_codec: fractions {found[0]} and {found[1]} of top_k, expected one for both",
            subject="params_codec",
            expected=f"top_k({found[0]!r}) twice",
            got=f"top_k({found[1]!r})",
        )
    return found[0] if found else 0.0


__all__ = [
    "BF16",
    "F16",
    "RAW",
    "TOP_K_FRACTION",
    "Cast",
    "Codec",
    "Decoder",
    "Int8",
    "Kind",
    "Raw",
    "Read",
    "Sign",
    "TopK",
    "fraction",
    "of",
    "parse",
    "payload_views",
    "reader",
    "scratch_bytes",
    "views",
    "where",
]
