"""The store and the study that the tests of the search have."""

from tuner.conftest import store, study_of

__all__ = ["store", "study_of"]
