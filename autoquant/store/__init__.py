"""The SQLite store: every fact of a search, under a key that says when it may be used again."""

from autoquant.store.connect import open_store
from autoquant.store.repository import Store
from autoquant.store.rows import StudyFacts

__all__ = ["Store", "StudyFacts", "open_store"]
