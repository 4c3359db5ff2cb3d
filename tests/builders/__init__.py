"""All that tests make up: records, plans, studies, requests, and what a report is made of.

`records` has one builder for each record; what a test does not name is filled in. The other modules
build on it.
"""
