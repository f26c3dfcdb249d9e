"""Configs of other libraries -> ours, by one table a library; the table in configs/README.md is made from these."""

from ftlib.config.imports import axolotl, llamafactory, torchtune, trl
from ftlib.config.imports.rules import Imported, Library

LIBRARIES: dict[str, Library] = {  # told in this order: each has keys that none before it has
    library.name: library for library in (axolotl.AXOLOTL, torchtune.TORCHTUNE, trl.TRL, llamafactory.LLAMA_FACTORY)
}

__all__ = ["LIBRARIES", "Imported", "Library"]
