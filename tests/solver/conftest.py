"""The store and the study that the tests of the search have."""

from tuner.conftest import filled, store, study_of

__all__ = ["filled", "store", "study_of"]
