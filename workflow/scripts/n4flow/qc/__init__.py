"""The report: metrics and panels of a scan on a page, and the dataset in a table."""
