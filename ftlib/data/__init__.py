"""From files to packed batches: sources, formats, masks, packing, and the loader whose position is two integers."""

from ftlib.data.collect import examples
from ftlib.data.documents import Document, Documents
from ftlib.data.examples import Example
from ftlib.data.loader import Loader, Plan, Step, eval_batches
from ftlib.data.loading import Datasets, load
from ftlib.data.packing import pack
from ftlib.data.preference import Wanted
from ftlib.data.preference_batch import AnswerBatch, Answers, Preferences
from ftlib.data.preview import preview
from ftlib.data.report import LoadReport

__all__ = [
    "AnswerBatch",
    "Answers",
    "Datasets",
    "Document",
    "Documents",
    "Example",
    "LoadReport",
    "Loader",
    "Plan",
    "Preferences",
    "Step",
    "Wanted",
    "eval_batches",
    "examples",
    "load",
    "pack",
    "preview",
]
