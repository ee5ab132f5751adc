"""Which codes name a language: by their shape (BCP 47), those of two letters by ISO 639-1, withdrawn ones too."""

from __future__ import annotations

import re

_SHAPE = re.compile(r"([a-z]{2,3})([-_][a-z0-9]{1,8})*", re.IGNORECASE)
_TWO_LETTERS = frozenset(
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en "
    "eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik in io is it iu iw "
    "ja ji jv jw ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mo mr ms mt "
    "my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm "
    "sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh "
    "zu".split()
)


def is_language(code: str) -> bool:
    """Whether ``code`` can name a language: ``de``, ``pt-BR``, ``fr_CA``, ``zh-Hant-TW``, ``ckb``. Of three letters any
    will do; a country's code of two, such as ``jp`` for ``ja``, does not, unless it is a language's too."""
    match = _SHAPE.fullmatch(code)
    return match is not None and (len(match[1]) == 3 or match[1].lower() in _TWO_LETTERS)
