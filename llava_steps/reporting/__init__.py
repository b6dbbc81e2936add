"""The report page of a run: its content, charts and HTML."""
