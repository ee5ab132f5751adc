"""What can name a language, and what cannot."""

from __future__ import annotations

import pytest

from polyvec.data.languages import is_language
from polyvec.samples import corpus


@pytest.mark.parametrize("code", ["de", "DE", "pt-BR", "fr_CA", "zh-Hant-TW", "es-419", "ckb", "eng_Latn", "iw"])
def test_codes_of_languages_scripts_and_regions_pass(code: str) -> None:
    assert is_language(code)


@pytest.mark.parametrize("code", ["English", "jp", "cz", "d", "de en", "de-", "7", "simple", ""])
def test_names_and_codes_of_countries_do_not(code: str) -> None:
    assert not is_language(code)


def test_the_sample_names_its_languages() -> None:
    assert all(is_language(row["lang"]) for row in corpus())
