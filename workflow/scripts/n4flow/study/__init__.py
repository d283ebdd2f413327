"""A dataset as a whole: config, sheet, BIDS names, ratings, manifest, provenance."""
