"""Configs of other libraries -> ours, by one table a library; the table in configs/README.md is made from these."""

from ftlib.config.imports import axolotl, llamafactory, torchtune
from ftlib.config.imports.rules import Imported, Library

LIBRARIES: dict[str, Library] = {
    library.name: library for library in (axolotl.AXOLOTL, torchtune.TORCHTUNE, llamafactory.LLAMA_FACTORY)
}

__all__ = ["LIBRARIES", "Imported", "Library"]
