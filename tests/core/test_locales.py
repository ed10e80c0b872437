"""What every translation of the nodes' texts keeps of the English ones."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LOCALES = Path(__file__).parents[2] / "locales"
SPACES = "\u0020\u00a0\u202f"  # plain, no-break, narrow no-break
# By language: what may stand between thousands, and before decimals. An English 2,500 would be read as 2.5 in the last
# four; a point before decimals is what widgets show, in every language.
WRITTEN = {
    "zh": (",", "."),
    "ja": (",", "."),
    "ko": (",", "."),
    "de": ("." + SPACES, ".,"),
    "fr": (SPACES, ".,"),
    "es": ("." + SPACES, ".,"),
    "ru": (SPACES, ".,"),
}
TIMES = "\u00d7"  # of a size: 16x16 may be written with it
LONG = 20  # shorter texts may be the same in two languages


def read(language: str) -> Any:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def leaves(texts: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every text with the keys that lead to it."""
    if not isinstance(texts, dict) or not texts:
        yield path, texts
        return
    for key, below in texts.items():
        yield from leaves(below, f"{path}/{key}")


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text))


def has_number(text: str, number: str, language: str) -> bool:
    """Whether a translation has an English number, as its language may write it, and not as a part of another."""
    between, before_decimals = WRITTEN[language]
    whole, _, decimals = number.partition(".")
    pattern = whole.replace(",", f"[{between}]?")
    if decimals:
        pattern += f"[{before_decimals}]{decimals}"
    return re.search(rf"(?<!\d)(?<!\d[.,]){pattern}(?![.,]?\d)", text) is not None


def tokens(text: str) -> set[str]:
    """What is typed or read somewhere else: names with a _ or a digit, paths, and ranges."""
    words = {word.rstrip(".-") for word in re.findall(r"[\w./-]+", text)}
    return {word for word in words if re.search(r"[_/]|\d", word) and not re.fullmatch(r"[\d.]+", word)}


def quoted(text: str) -> set[str]:
    return set(re.findall(r'"(.+?)"', text))


def test_there_are_these_languages_and_no_others() -> None:
    assert {folder.name for folder in LOCALES.iterdir() if folder.is_dir()} == {"en", *WRITTEN}


@pytest.mark.parametrize(
    ("text", "number", "language", "found"),
    [
        ("höchstens 2.500 Aufrufe", "2,500", "de", True),
        ("höchstens 2,500 Aufrufe", "2,500", "de", False),
        ("au plus 2\u00a0500 appels", "2,500", "fr", True),
        ("das 1,1-Fache, denoise 0.3", "1.1", "de", True),
        ("das 1,1-Fache, denoise 0.3", "0.3", "de", True),
        ("das 1,1-Fache, denoise 0.3", "1", "de", False),
        ("das 1,1-Fache, denoise 0.3", "3", "de", False),
        ("最多2,500次。", "2,500", "zh", True),
        ("最多2500次。", "2,500", "zh", True),
        ("最多12,500次。", "2,500", "zh", False),
        ("1,1倍", "1.1", "zh", False),
        ("5が使えます。", "5", "ja", True),
    ],
)
def test_numbers_are_found_as_a_language_writes_them(text: str, number: str, language: str, found: bool) -> None:
    assert has_number(text, number, language) is found


def test_tokens_are_what_is_typed() -> None:
    text = "PREFIX_00001_.safetensors in models/made, a range, as 3-10, of 1,000 or 0.5; image-to-image becomes _."
    assert tokens(text) == {"PREFIX_00001_.safetensors", "models/made", "3-10", "_"}


@pytest.mark.parametrize("language", WRITTEN)
def test_a_translation_has_the_keys_of_the_english_texts(language: str) -> None:
    assert [path for path, _ in leaves(read(language))] == [path for path, _ in leaves(read("en"))]


@pytest.mark.parametrize("language", WRITTEN)
def test_everything_is_translated(language: str) -> None:
    for (path, text), (_, english) in zip(leaves(read(language)), leaves(read("en")), strict=True):
        if english:
            assert isinstance(text, str), path
            assert text.strip(), path
            assert len(english) <= LONG or text != english, path
        else:
            assert text == english, f"{path}: a node without inputs"


@pytest.mark.parametrize("language", WRITTEN)
def test_a_translation_keeps_numbers_names_and_options(language: str) -> None:
    """Quoted words are options and prompts, which stay English, or nodes, which have the translation's names."""
    english_texts, translation = read("en"), read(language)
    titles = {node["display_name"]: translation[name]["display_name"] for name, node in english_texts.items()}
    lost = []
    for (path, text), (_, english) in zip(leaves(translation), leaves(english_texts), strict=True):
        if not english:
            continue
        needed = tokens(english) | {titles.get(words, words) for words in quoted(english)}
        missing = {word for word in needed if word not in text.replace(TIMES, "x")}
        missing |= {number for number in numbers(english) if not has_number(text, number, language)}
        lost += [f"{path} lacks {word}" for word in sorted(missing)]
    assert not lost, "\n".join(lost)


@pytest.mark.parametrize("language", WRITTEN)
def test_no_text_has_a_sign_that_the_browser_reads_as_code(language: str) -> None:
    """Vue I18n takes {name}, @:link and one | other for instructions."""
    assert not [path for path, text in leaves(read(language)) if text and re.search(r"[{}@|]", text)]
