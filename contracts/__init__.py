"""What others may rely on: the events (JSON Schemas, AsyncAPI) and the analysts' tables (ODCS)."""
