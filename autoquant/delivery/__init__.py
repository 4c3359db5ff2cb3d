"""What leaves the package: a plan applied, saved and loaded, used by transformers, or exported."""
