"""The English texts that translations are made from are those of the nodes."""

import json
from typing import Any

from comfyui import PACK

from scripts.node_texts import texts


def test_the_english_file_has_the_nodes_own_texts(pack: Any) -> None:
    kept = json.loads((PACK / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert kept == texts(pack), "python scripts/node_texts.py writes it anew; then the translations want a look"
